"""Station 3, rows adapt: the factors of experts' adapters, and how PEFT lays them out."""
