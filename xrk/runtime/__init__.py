"""How a network is run on a frame: where (`device.py`), within what memory (`budget.py`), and how (`whole.py`)."""
