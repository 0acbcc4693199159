import torch, traceback
from tests.distributed.test_own_loop import after_backward
from tests.helpers.ranks import run_ranks
def f():
    out=[]
    for kw in ({"foreach":True},{"fused":True},{"foreach":False},{}):
        for cls in (torch.optim.AdamW, torch.optim.SGD):
            m=after_backward()
            try:
                o=cls(m.parameters(), lr=0.1, **kw); o.step(); o.step()
                out.append((cls.__name__,kw,"ok", {n:p.full_tensor().sum().item() for n,p in list(m.named_parameters())[8:12]}))
            except Exception as e:
                out.append((cls.__name__,kw,repr(e)[:250]))
    return out
def test():
    for x in run_ranks(f,2)[0]: print(x)
