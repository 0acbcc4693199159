"""`hf-moe-accel demo`: train, save, reload and draw a small mixture-of-experts model, with nothing downloaded."""
