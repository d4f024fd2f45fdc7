"""A GGUF file read back by transformers, and by llama.cpp where xllamacpp is installed, is the written checkpoint."""

import numpy as np
import pytest
import torch
from tiny_lm import READINGS, TITLES, item_lm, language_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from lwa_helpers import build_student, load_movielens, paths
from lwa_helpers.assets import embedded_file
from lwa_helpers.cli import main
from lwa_helpers.errors import LwaError
from lwa_helpers.models.gguf_export import export_gguf
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.models.vocabulary import trim_vocabulary
from lwa_helpers.ranking.title_head import TitleRanker

TEXTS = [f"{title}\n" for title in TITLES] + ["Seen:\n"]
CONFIGS = {
    "tied": {"tie_word_embeddings": True},
    "its own head": {"tie_word_embeddings": False},
    "wide heads": {"head_dim": 16, "rms_norm_eps": 1e-5},
    "unused rows": {
        "config": LlamaConfig(
            vocab_size=345,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            rope_theta=5e4,
        )
    },
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Files that load_teacher converts go with the test."""
    monkeypatch.setattr(paths, "CACHE", tmp_path.with_name(tmp_path.name + "-cache"))


def moved(lm):
    """The model with norms that are not what a reader would fill in."""
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return lm


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_reads_the_same_model(kind, tmp_path):
    lm = moved(language_model(**CONFIGS[kind]))
    path = export_gguf(lm, tmp_path, "f32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in [*TEXTS, "Zorblax 42 ☃\n", "<end> a"]:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        assert tokenizer(text)["input_ids"] == ids[0].tolist()
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


def test_a_trimmed_student_in_half_precision_ranks_alike(tmp_path):
    lm = trim_vocabulary(moved(language_model()), TEXTS)
    again = load_teacher(export_gguf(lm, tmp_path))
    histories, candidates = [[0, 3], [5]], [[1, 2, 7, 4], [0, 4, 6, 1]]
    want = TitleRanker(lm.model, lm.tokenizer, "Seen:\n", TITLES).score(histories, candidates)
    got = TitleRanker(again.model, again.tokenizer, "Seen:\n", TITLES).score(histories, candidates)
    np.testing.assert_allclose(got, want, atol=0.05)
    assert (got.argsort() == want.argsort()).all()


@pytest.fixture(scope="module")
def movielens_lm():
    """A tiny random Llama with SmolLM2's tokenizer, cut to MovieLens."""
    file = embedded_file("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    full = LanguageModel("tiny", moved(language_model(config=config)).model, tokenizer, "0" * 64)
    return trim_vocabulary(full, [f"{title}\n" for title in load_movielens().titles])


def test_the_real_cut_tokenizer_survives(movielens_lm, tmp_path):
    """Every title has the same tokens; special tokens, chat template and logits are kept."""
    lm = movielens_lm
    again = load_teacher(export_gguf(lm, tmp_path, "f32"))
    texts = [f"{title}\n" for title in load_movielens().titles] + ["<|im_start|>user\nHi 1984!<|im_end|>\n"]
    assert again.tokenizer(texts)["input_ids"] == lm.tokenizer(texts)["input_ids"]
    assert (
        again.tokenizer.eos_token_id == lm.tokenizer.eos_token_id
        and again.tokenizer.chat_template == lm.tokenizer.chat_template
    )
    ids = torch.tensor([lm.tokenizer(texts[7])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_llama_cpp_reads_the_same_model(movielens_lm, tmp_path):
    llama = pytest.importorskip(
        "xllamacpp", reason="compares with llama.cpp: pip install 'layerwise-adapter[llamacpp]'"
    )
    lm = movielens_lm
    size = lm.model.config.vocab_size
    settings = llama.CommonParams()
    settings.model.path = str(export_gguf(lm, tmp_path, "f32"))
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.cpuparams.n_threads = 256, 1, False, 1
    server = llama.Server(settings)
    for text in ("Toy Story (1995)\nHeat (1995)\n", "Été à Paris 12", "日本"):
        ids = lm.tokenizer(text)["input_ids"]
        ask = {"n_predict": 1, "n_probs": size, "temperature": 0, "post_sampling_probs": False}
        for prompt in (text, ids):
            answer = server.handle_completions(ask | {"prompt": prompt})
            assert answer["usage"]["prompt_tokens"] == len(ids)
            log_p = {
                row["id"]: row["logprob"] for row in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            }
            with torch.no_grad():
                want = lm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(torch.tensor([log_p[i] for i in range(size)]), want, rtol=0, atol=2e-3)


WHY = "the vocabulary of a model that reads items has no merges, without which no reader takes a GGUF file"
NO_MERGES = pytest.mark.xfail(strict=True, reason=WHY)
EXPORTED = [pytest.param(reading, marks=NO_MERGES) if reading == "items" else reading for reading in READINGS]


@pytest.mark.parametrize("reading", EXPORTED)
def test_item_tokens_and_their_head_are_part_of_the_file(reading, tmp_path):
    """transformers' reader knows their names and rows, but reads a title in a text as other tokens: see below."""
    lm = item_lm(reading, moved(language_model()))
    again = load_teacher(export_gguf(lm, tmp_path, "f32"))
    ids = [lm.items.first + item for item in (5, 0, 3)]
    assert [again.tokenizer.decode(i) for i in ids] == ["Heat\n", "Toy Story\n", "Été à Paris\n"]
    text = [] if reading == "items" else lm.tokenizer("Seen:")["input_ids"]
    with torch.no_grad():
        got, want = (model(torch.tensor([text + ids])).logits for model in (again.model, lm.model))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reading", EXPORTED)
def test_llama_cpp_reads_a_list_of_titles_as_items(reading, tmp_path):
    llama = pytest.importorskip(
        "xllamacpp", reason="compares with llama.cpp: pip install 'layerwise-adapter[llamacpp]'"
    )
    lm = item_lm(reading, moved(language_model()))
    size, settings = lm.model.config.vocab_size, llama.CommonParams()
    settings.model.path = str(export_gguf(lm, tmp_path, "f32"))
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.cpuparams.n_threads = 256, 1, False, 1
    server = llama.Server(settings)
    ask = {"prompt": "Toy Story\nÉté à Paris\nHeat\n", "n_predict": 1, "n_probs": size, "temperature": 0}
    answer = server.handle_completions(ask | {"post_sampling_probs": False})
    ids = lm.tokenizer(ask["prompt"])["input_ids"]
    assert answer["usage"]["prompt_tokens"] == len(ids) == 3
    log_p = {row["id"]: row["logprob"] for row in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    with torch.no_grad():
        want = lm.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor([log_p[i] for i in range(size)]), want, rtol=0, atol=5e-3)


def test_a_padding_token_that_the_model_has_no_row_for_is_left_out(tmp_path):
    lm = language_model()
    lm.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    again = load_teacher(export_gguf(lm, tmp_path, "f32"))
    ids = torch.tensor([lm.tokenizer(TEXTS[3])["input_ids"]])
    assert again.tokenizer(TEXTS[3])["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, lm.model(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_written_is_named(tmp_path):
    gpt2 = language_model(config=GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=340, n_positions=64))
    with pytest.raises(LwaError, match="is a gpt2: GGUF export knows llama"):
        export_gguf(gpt2, tmp_path)
    with pytest.raises(LwaError, match="f32, f16"):
        export_gguf(language_model(), tmp_path, "q4")
    scaled = language_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(LwaError, match="scales its positions"):
        export_gguf(scaled, tmp_path)
    with pytest.raises(LwaError, match="llama with biases"):
        export_gguf(language_model(attention_bias=True), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_checkpoint_that_ollama_can_be_given(tmp_path, capsys):
    student = build_student(moved(language_model()), 1, "first", TEXTS)
    student.save(tmp_path / "student")
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "served"), "--dtype", "f32"]) == 0
    assert f"ollama create NAME -f {tmp_path / 'served' / 'Modelfile'}" in capsys.readouterr().out
    again, ids = (
        load_teacher(tmp_path / "served" / "model.gguf"),
        torch.tensor([student.tokenizer(TEXTS[0])["input_ids"]]),
    )
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, student.model(ids).logits, rtol=1e-4, atol=1e-5)
