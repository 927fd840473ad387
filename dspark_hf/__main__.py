"""`python -m dspark_hf`: the command line."""

from dspark_hf.cli.main import app

if __name__ == "__main__":
    app(prog_name="python -m dspark_hf")
