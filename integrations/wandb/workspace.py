"""Makes a W&B workspace for a project's runs, with the panels of panels.json. Needs wandb-workspaces and an account.

python integrations/wandb/workspace.py ENTITY PROJECT
"""

import argparse
import json
from pathlib import Path
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws


def panel(title: str, keys: list[str], kind: str = "line") -> Any:
    """A panel of panels.json."""
    if kind == "media":
        return wr.MediaBrowser(title=title, media_keys=keys)
    if kind == "table":
        return wr.WeavePanelSummaryTable(table_name=keys[0])
    plot_type = "stacked-area" if kind == "stacked" else "line"
    return wr.LinePlot(title=title, x="train/global_step", y=keys, plot_type=plot_type)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entity")
    parser.add_argument("project")
    cli = parser.parse_args()
    workspace = ws.Workspace(
        entity=cli.entity,
        project=cli.project,
        name="hf_moe_accel",
        sections=[
            ws.Section(
                name=section,
                is_open=True,
                panels=[panel(**each) for each in panels],
            )
            for section, panels in json.loads((Path(__file__).parent / "panels.json").read_text()).items()
        ],
    )
    print(workspace.save().url)
