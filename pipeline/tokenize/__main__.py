"""`python -m pipeline.tokenize`: text, or tokens as they come, to token shards."""

from pipeline.params import TokenizeParams
from pipeline.runtime import command
from pipeline.runtime.machine import Machine
from pipeline.runtime.params_file import load_section
from pipeline.store.code_key import code_key
from pipeline.tokenize.stage import OUT, RAW, tokenize


def main() -> None:
    """Read the parameters, tokenize, print one summary."""
    params = load_section("tokenize", TokenizeParams)
    manifest = tokenize(RAW, OUT, params, Machine.load(), code_key("tokenize"))
    splits = ", ".join(
        f"{name} {t.tokens:,} tokens of {t.docs:,} documents in {t.shards} shards"
        for name, t in manifest.totals.items()
    )
    print(f"tokenize: {splits} in {OUT}; dataset_key {manifest.dataset_key[:12]}")


if __name__ == "__main__":
    command.run(main)
