"""Tests for the commands `model.generate`, `model.export` and `model.import_hf`."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from model import GPT, GPTConfig, checkpoint, export, generate, import_hf
from model.config import EOT
from model.generate import decode_stream
from pipeline.format.tokenizer import encode
from tests.support.hub import TOKEN, Hub
from tests.support.repo import REPO

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.write(folder, CONFIG, GPT(CONFIG).state_dict(), {})
    return folder


def fails(result, *named):
    """Return whether the status is 2 and a single line on stderr names the flag or file."""
    status, _, err = result
    one_line = err.startswith("error: ") and err.count("\n") == 1
    return status == 2 and one_line and all(name in err for name in named)


def test_generate_as_a_subprocess(saved):
    flags = [sys.executable, "-m", "model.generate", "--checkpoint", str(saved), "--seed", "1"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [*flags, "--prompt", "Hello, Wörld", "--max-new-tokens", "30"],
        cwd=REPO, env=env, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("Hello, Wörld")
    assert len(done.stdout) > 40
    cut = subprocess.run(
        f"{shlex.join(flags)} | head -c 1", shell=True, cwd=REPO, capture_output=True, check=False
    )
    assert (len(cut.stdout), cut.stderr) == (1, b"")


def test_document_generated_with_a_seed_is_reproducible_beyond_the_block_size(saved, call):
    flags = ["--checkpoint", saved, "--max-new-tokens", 40, "--device", "cpu"]
    first = call(generate, *flags, "--seed", 5)
    assert first[0] == 0
    assert "endoftext" not in first[1]
    assert call(generate, *flags, "--seed", 5) == first
    assert call(generate, *flags, "--seed", 6) != first
    greedy = [*flags, "--temperature", 0]
    assert call(generate, *greedy) == call(generate, *greedy)


def test_endoftext_in_a_prompt_starts_a_document_only_on_request(
    saved, call, monkeypatch: pytest.MonkeyPatch
):
    prompts: list[list[int]] = []

    def stream(_: object, rows: list[list[int]], *__: object) -> Iterator[list[int]]:
        prompts.extend(rows)
        return iter(())

    monkeypatch.setattr(generate, "stream", stream)
    text = "<|endoftext|>a<|endoftext|>b"
    for flags in ([], ["--special-tokens"]):
        assert call(generate, "--checkpoint", saved, "--prompt", text, *flags)[0] == 0
    a, b, marker = map(encode, ("a", "b", "<|endoftext|>"))
    assert prompts == [[EOT, *marker, *a, *marker, *b], [EOT, *a, EOT, *b]]


def test_export_then_import_gives_the_same_model(saved, call, tmp_path):
    status, out, _ = call(export, "--checkpoint", saved, "--out", tmp_path / "hf")
    assert status == 0
    assert str(tmp_path / "hf") in out
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json"} <= names
    assert {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"} <= names
    assert "README.md" in names
    assert call(import_hf, tmp_path / "hf", "--out", tmp_path / "back")[0] == 0
    again = GPT.from_checkpoint(tmp_path / "back")
    for p, q in zip(again.parameters(), GPT(CONFIG).parameters(), strict=True):
        assert torch.equal(p, q)
    flags = ["--prompt", "x", "--max-new-tokens", 12, "--seed", 1]
    text = call(generate, "--checkpoint", saved, *flags)
    assert call(generate, "--checkpoint", tmp_path / "hf", *flags) == text


def test_generate_names_wrong_flags_and_folders(saved, call, tmp_path):
    assert fails(call(generate), "--checkpoint")
    assert fails(call(generate, "--checkpoint", tmp_path / "none"), "--checkpoint", "none")
    assert fails(call(generate, "--checkpoint", tmp_path), "--checkpoint", str(tmp_path))
    flags = ["--checkpoint", saved]
    assert fails(call(generate, *flags, "--top-k", "many"), "--top-k")
    assert fails(call(generate, *flags, "--device", "gpu"), "--device gpu")
    for temperature in (-1, "1e-320", "1e308", "inf", "nan"):
        assert fails(call(generate, *flags, "--temperature", temperature), "temperature")
    for device in ("meta", "hpu", ""):  # no values, no such module, no name
        assert fails(call(generate, *flags, "--device", device), f"--device {device}")
    assert fails(call(generate, *flags, "--hot"), "--hot")
    if not torch.cuda.is_available():
        assert fails(call(generate, *flags, "--device", "cuda"), "--device cuda")
    small = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=300)
    checkpoint.write(tmp_path / "small", small, GPT(small).state_dict(), {})
    assert fails(call(generate, "--checkpoint", tmp_path / "small"), "--checkpoint", "300")


def test_export_and_import_name_wrong_folders(saved, call, tmp_path, monkeypatch):
    assert fails(call(export, "--checkpoint", tmp_path / "none", "--out", tmp_path), "none")
    (tmp_path / "file").write_text("")
    assert fails(call(export, "--checkpoint", saved, "--out", tmp_path / "file"), "file")
    assert fails(call(import_hf, saved, "--out", tmp_path / "new"), "config.json")
    assert fails(call(import_hf, tmp_path / "hf", "--out", saved), "--out", str(saved))
    assert fails(call(import_hf, "", "--out", tmp_path / "new"), "DIR")  # not the folder we are in
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    assert fails(call(import_hf, tmp_path / "none", "--out", tmp_path / "new"), "none")
    assert not (tmp_path / "new").exists()


def test_export_is_uploaded_only_with_the_flag_and_only_with_a_token(call, tmp_path, monkeypatch):
    small = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=300)
    checkpoint.write(tmp_path / "small", small, GPT(small).state_dict(), {})
    out = tmp_path / "out"
    flags = ["--checkpoint", tmp_path / "small", "--out", out]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_ofSomebodyElse")
    with Hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        assert call(export, *flags)[0] == 0
        shutil.rmtree(out)
        for wrong in ("", "model", "a/b/c", "me/mo del", "me/x.git", 'me/x")', "me/x\n", "../x"):
            assert fails(call(export, *flags, "--push", wrong), "--push", "OWNER/NAME")
        address = f"https://me:{TOKEN}@huggingface.co/me/x"
        result = call(export, *flags, "--push", address)
        assert fails(result, "--push")
        assert TOKEN not in "".join(map(str, result))
        assert not out.exists()
        assert hub.requests == []
        assert fails(call(export, *flags, "--push", "me/model"), "--push me/model", "HF_TOKEN")
        assert hub.repos == {}
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        status, printed, _ = call(export, *flags, "--push", "me/model")
        repo = hub.repos["me/model"]
        uploaded = repo.commits[repo.refs["main"]]
    assert status == 0
    assert repo.refs["main"] in printed
    assert repo.private
    assert uploaded == {path.name: path.read_bytes() for path in out.iterdir()}
    assert b'from_pretrained("me/model")' in uploaded["README.md"]
    for wrong in ("--push", "--project", "--licence"):
        assert fails(call(export, *flags, wrong, "me/x", "--format", "llmc"), wrong)


def test_import_downloads_a_name_on_the_hub(tmp_path):
    """From a hub on loopback; pickle files are not downloaded."""
    GPT(CONFIG).to_hf(tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with Hub() as hub:
        hub.repo("openai-community/gpt2").commit({**files, "pytorch_model.bin": b"pickle"})
        weights = files.pop("model.safetensors")
        hub.repo("some/pickle").commit({**files, "pytorch_model.bin": weights})
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "model.import_hf", name, "--out", tmp_path / str(i)],
                cwd=REPO,
                env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")},
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, name in enumerate(["openai-community/gpt2", "some/pickle", "nobody/nothing"])
        ]
        errors = [process.communicate(timeout=120)[1] for process in running]
        asked = {request.path for request in hub.asked("cdn")}
    assert running[0].returncode == 0, errors[0]
    for p, q in zip(
        GPT.from_checkpoint(tmp_path / "0").parameters(), GPT(CONFIG).parameters(), strict=True
    ):
        assert torch.equal(p, q)
    for i, named in ((1, "model.safetensors"), (2, "nobody/nothing")):
        last = errors[i].splitlines(keepends=True)[-1]  # after the progress of the download
        assert fails((running[i].returncode, "", last), named)
    assert asked == {"model.safetensors"}


def test_incomplete_characters_are_printed_with_their_last_token():
    table = {0: b"a", 1: b"\xf0\x9f", 2: b"\x99\x82", 3: b"\xff"}

    def decode(tokens):
        return b"".join(table[t] for t in tokens)

    assert list(decode_stream([0, 1, 2, 0], decode)) == ["a", "", "🙂", "a", ""]
    assert "".join(decode_stream([0, 3, 1], decode)) == "a\ufffd\ufffd"


def test_importing_the_model_imports_no_pipeline_and_no_transformers():
    code = (
        "import sys, model, model.generate, model.export, model.import_hf\n"
        "bad = {'pipeline', 'train', 'transformers', 'huggingface_hub'}\n"
        "print({m.partition('.')[0] for m in sys.modules} & bad)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
