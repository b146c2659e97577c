"""`python -m model.generate`, `model.export`, `model.import_hf`, as they are typed."""

import os
import subprocess
import sys

import pytest
import torch

from model import GPT, GPTConfig, checkpoint, command, export, generate, import_hf
from model.generate import as_text
from tests.support.hub import Hub
from tests.support.repo import REPO

CONFIG = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    checkpoint.write(folder, CONFIG, GPT(CONFIG).state_dict(), {})
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command in this process: (exit status, standard output, standard error)."""

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
        with pytest.raises(SystemExit) as caught:
            command.run(module.main)
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


def fails(result, *words):
    """Status 2, nothing but one line on standard error."""
    status, _, err = result
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    return True


def test_generate_in_a_process_of_its_own(saved):
    def shell(*flags):
        return subprocess.run(
            [sys.executable, "-m", "model.generate", "--checkpoint", saved, *flags],
            cwd=REPO,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=False,
        )

    done = shell("--prompt", "Hello, Wörld", "--max-new-tokens", "30", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("Hello, Wörld")
    assert len(done.stdout) > 40
    wrong = shell("--temperature", "-1")
    command = f'"{sys.executable}" -m model.generate --checkpoint "{saved}" --seed 1 | head -c 1'
    cut = subprocess.run(command, shell=True, cwd=REPO, capture_output=True, check=False)
    assert (len(cut.stdout), cut.stderr) == (1, b"")
    assert fails((wrong.returncode, "", wrong.stderr.decode()), "temperature")


def test_generate_repeats_with_a_seed_and_goes_past_the_block_size(saved, call):
    flags = ["--checkpoint", saved, "--prompt", "a", "--max-new-tokens", 40, "--device", "cpu"]
    first = call(generate, *flags, "--seed", 5)
    assert first[0] == 0
    assert first[1].startswith("a")
    assert call(generate, *flags, "--seed", 5) == first
    assert call(generate, *flags, "--seed", 6) != first
    greedy = [*flags, "--temperature", 0]
    assert call(generate, *greedy) == call(generate, *greedy)


def test_generate_without_a_prompt_begins_a_document(saved, call):
    status, out, _ = call(generate, "--checkpoint", saved, "--max-new-tokens", 3)
    assert status == 0
    assert "endoftext" not in out


def test_export_and_import_go_round(saved, call, tmp_path):
    status, out, _ = call(export, "--checkpoint", saved, "--out", tmp_path / "hf")
    assert status == 0
    assert str(tmp_path / "hf") in out
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json"} <= names
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} <= names
    assert call(import_hf, tmp_path / "hf", "--out", tmp_path / "back")[0] == 0
    again = GPT.from_checkpoint(tmp_path / "back")
    for p, q in zip(again.parameters(), GPT(CONFIG).parameters(), strict=True):
        assert torch.equal(p, q)
    flags = ["--prompt", "x", "--max-new-tokens", 12, "--seed", 1]
    texts = [
        call(generate, "--checkpoint", folder, *flags)
        for folder in (saved, tmp_path / "hf", tmp_path / "back")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_mistakes_of_generate(saved, call, tmp_path):
    assert fails(call(generate), "--checkpoint")
    assert fails(call(generate, "--checkpoint", tmp_path / "none"), "is no folder")
    assert fails(call(generate, "--checkpoint", tmp_path), "holds no model")
    flags = ["--checkpoint", saved]
    assert fails(call(generate, *flags, "--top-k", "many"), "--top-k")
    assert fails(call(generate, *flags, "--top-k", 0), "top_k")
    assert fails(call(generate, *flags, "--top-p", 2), "top_p")
    assert fails(call(generate, *flags, "--max-new-tokens", -1), "max_new_tokens")
    assert fails(call(generate, *flags, "--device", "gpu"), "--device gpu")
    assert fails(call(generate, *flags, "--hot"), "--hot")
    if not torch.cuda.is_available():
        assert fails(call(generate, *flags, "--device", "cuda"), "--device cuda")
    small = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=300)
    checkpoint.write(tmp_path / "small", small, GPT(small).state_dict(), {})
    assert fails(call(generate, "--checkpoint", tmp_path / "small"), "300 tokens")


def test_mistakes_of_export_and_import(saved, call, tmp_path, monkeypatch):
    assert fails(call(export, "--checkpoint", tmp_path / "none", "--out", tmp_path), "none")
    (tmp_path / "file").write_text("")
    assert fails(call(export, "--checkpoint", saved, "--out", tmp_path / "file"), "file")
    assert fails(call(import_hf, saved, "--out", tmp_path / "new"), "config.json")
    assert fails(call(import_hf, tmp_path / "hf", "--out", saved), "checkpoint already")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    assert fails(call(import_hf, tmp_path / "none", "--out", tmp_path / "new"), "is no folder")
    assert not (tmp_path / "new").exists()


def test_import_takes_a_name_on_the_hub(tmp_path):
    """By huggingface_hub's own client, from a hub on loopback; pickles are not even fetched."""
    GPT(CONFIG).to_hf(tmp_path / "hf")
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    with Hub() as hub:
        hub.repo("openai-community/gpt2").commit({**files, "pytorch_model.bin": b"pickle"})
        weights = files.pop("model.safetensors")
        hub.repo("some/pickle").commit({**files, "pytorch_model.bin": weights})
        running = {
            name: subprocess.Popen(
                [sys.executable, "-m", "model.import_hf", name, "--out", tmp_path / str(i)],
                cwd=REPO,
                env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, name in enumerate(["openai-community/gpt2", "some/pickle", "nobody/nothing"])
        }
        ended = [(*process.communicate(timeout=120), process) for process in running.values()]
        results = [(process.returncode, out, err) for out, err, process in ended]
        asked = {request.path for request in hub.asked("cdn")}
    assert results[0][0] == 0, results[0][2]
    assert GPT.from_checkpoint(tmp_path / "0").config == CONFIG
    for p, q in zip(
        GPT.from_checkpoint(tmp_path / "0").parameters(), GPT(CONFIG).parameters(), strict=True
    ):
        assert torch.equal(p, q)
    for (status, _, err), words in zip(
        results[1:], ["safetensors files only", "nobody/nothing is no folder"], strict=True
    ):
        last = err.splitlines(keepends=True)[-1]  # above it stands how the download went
        assert fails((status, "", last), words)
    assert asked == {"model.safetensors"}


def test_text_waits_for_whole_characters():
    table = {0: b"a", 1: b"\xf0\x9f", 2: b"\x99\x82", 3: b"\xff"}

    def decode(tokens):
        return b"".join(table[t] for t in tokens)

    assert list(as_text([0, 1, 2, 0], decode)) == ["a", "", "🙂", "a", ""]
    assert "".join(as_text([0, 3, 1], decode)) == "a\ufffd\ufffd"


def test_importing_the_model_loads_neither_pipeline_nor_transformers():
    code = (
        "import sys, model, model.generate, model.export, model.import_hf\n"
        "bad = {'pipeline', 'train', 'transformers', 'huggingface_hub'}\n"
        "print({m.partition('.')[0] for m in sys.modules} & bad)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
