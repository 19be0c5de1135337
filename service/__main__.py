"""`python -m service` is `twinserve`."""

from service.cli import app

if __name__ == "__main__":
    app(prog_name="twinserve")
