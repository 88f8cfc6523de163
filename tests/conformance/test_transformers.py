"""Models of Transformers, tiny and with random weights, beside a loop by hand: they compute their own loss."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import kerastorch as kt
from kerastorch import seeding

pytestmark = pytest.mark.conformance
transformers = pytest.importorskip("transformers")

SAMPLES, LENGTH, TOKENS, BATCH, RATE = 26, 8, 30, 8, 1e-2
CLOSE = {"rtol": 1e-5, "atol": 1e-7}  # in float64, but some of the models compute their loss in float32
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bert(kind, dropout, **options):
    drop = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(vocab_size=TOKENS, max_position_embeddings=LENGTH, **SIZES, **drop, **options)
    return getattr(transformers, kind)(config)


def gpt2(dropout):
    sizes = {"n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=TOKENS, **sizes, **drop))


def llama(dropout):
    config = transformers.LlamaConfig(vocab_size=TOKENS, **SIZES, max_position_embeddings=LENGTH)
    return transformers.LlamaForCausalLM(config)


def t5(dropout):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=TOKENS, dropout_rate=dropout, **sizes)
    )


def bart(dropout):
    layers = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": LENGTH}
    config = transformers.BartConfig(vocab_size=TOKENS, dropout=dropout, **layers, **sizes)
    return transformers.BartForCausalLM(config)


# Name of the model -> how it is made, and the tokens at the start of a sample that are never targets.
MODELS = {
    "BertForSequenceClassification": (lambda dropout: bert("BertForSequenceClassification", dropout), None),
    "BertForTokenClassification": (lambda dropout: bert("BertForTokenClassification", dropout, num_labels=TOKENS), 0),
    "BertForMaskedLM": (lambda dropout: bert("BertForMaskedLM", dropout), 0),
    "BertLMHeadModel": (lambda dropout: bert("BertLMHeadModel", dropout, is_decoder=True), 1),
    "GPT2LMHeadModel": (gpt2, 1),
    "LlamaForCausalLM": (llama, 1),
    "T5ForConditionalGeneration": (t5, 0),
    "BartForCausalLM": (bart, 0),
}


def make(name, dropout=0.1):
    torch.manual_seed(0)
    return MODELS[name][0](dropout)


def data_for(name):
    """Sentences of 2 to 8 tokens; the labels are -100 where there is no token, and at half of the others."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, TOKENS, (SAMPLES, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (SAMPLES, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    hidden = (mask == 0) | (
        torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0.1, 0.8, SAMPLES)[:, None]
    )
    labels = tokens[:, 0] % 2 if MODELS[name][1] is None else torch.where(hidden, -100, tokens)
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def units(name, labels):
    """How many targets a mean over these labels is of."""
    skipped = MODELS[name][1]
    return len(labels) if skipped is None else int((labels[:, skipped:] != -100).sum())


def by_hand(name, net, data, epochs=2, clip=None, schedule=None, autocast=None, make_optimizer=torch.optim.AdamW):
    """Trains `net` in place; returns the means of each epoch's loss, over samples or unmasked tokens."""
    optimizer, losses = make_optimizer(net.parameters(), RATE, fused=True), []
    scheduler = None if schedule is None else schedule(optimizer)
    net.train()
    for epoch in range(epochs):
        total = count = 0
        for rows in seeding.epoch_order(SAMPLES, epoch).split(BATCH):
            batch = {key: column[rows] for key, column in data.items()}
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss = net(**batch).loss
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            total, count = (
                total + loss.item() * units(name, batch["labels"]),
                count + units(name, batch["labels"]),
            )
        losses.append(total / count)
    return losses


def linear(optimizer):
    return transformers.get_linear_schedule_with_warmup(optimizer, 0, 2 * math.ceil(SAMPLES / BATCH))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("compiled", "hand"),
    [
        ({}, {}),
        ({"clip": 0.5, "schedule": "linear"}, {"clip": 0.5, "schedule": linear}),
        ({"precision": "bf16"}, {"autocast": torch.bfloat16}),
    ],
    ids=["plain", "clip and schedule", "bf16"],
)
def test_training_is_that_of_a_loop_by_hand(name, compiled, hand):
    expected, net, data = make(name), make(name), data_for(name)
    torch.manual_seed(1)
    losses = by_hand(name, expected, data, **hand)
    model = kt.Model(net, backend="cpu").compile("adamw", lr=RATE, **compiled)
    torch.manual_seed(1)
    history = model.fit(data, epochs=2, batch_size=BATCH, verbose=0).history
    assert history["loss"] == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_is_the_large_batch_whatever_is_masked(name, accumulate):
    large, data = make(name, dropout=0.0).double(), data_for(name)
    small, histories = copy.deepcopy(large), []
    for net, size, window in ((large, 4 * accumulate, 1), (small, 4, accumulate)):
        model = kt.Model(net, backend="cpu").compile("sgd", lr=0.1, clip=1.0)
        options = {"batch_size": size, "accumulate": window, "shuffle": False, "verbose": 0}
        histories.append(model.fit(data, epochs=2, **options).history["loss"])
    for ours, theirs in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_large_batch_of_the_whole_epoch_in_small_ones(name):
    """All 26 samples make one step, whose gradient torch computes at once."""
    net, data = make(name, dropout=0.0).double(), data_for(name)
    expected = copy.deepcopy(net).train()
    loss = expected(**data).loss
    loss.backward()
    torch.optim.SGD(expected.parameters(), 0.1).step()
    model = kt.Model(net, backend="cpu").compile("sgd", lr=0.1)
    history = model.fit(data, batch_size=4, accumulate=7, verbose=0).history
    assert history["loss"] == [pytest.approx(loss.item(), rel=1e-6)]
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_and_prediction_are_those_of_the_whole_data(name):
    net, data = make(name), data_for(name)
    with torch.no_grad():
        whole = net.eval()(**data)
    model = kt.Model(net, backend="cpu").compile("adamw")
    assert model.evaluate(data, batch_size=BATCH, verbose=0) == pytest.approx(whole.loss.item(), rel=1e-5)
    predicted = model.predict({key: column.numpy() for key, column in data.items()}, batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(predicted["logits"], whole.logits.numpy(), rtol=1e-4, atol=1e-5)
    inputs = {key: column for key, column in data.items() if key != "labels" or name.startswith("T5")}
    np.testing.assert_allclose(model.predict(inputs, verbose=0)["logits"], whole.logits.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layers"), [("GPT2LMHeadModel", "transformer.h"), ("BertForMaskedLM", "*.layer")])
def test_a_frozen_layer_stays_and_each_other_has_its_rate(name, layers):
    net, data = make(name), data_for(name)
    before = copy.deepcopy(net)
    model = kt.Model(net, backend="cpu").compile("adamw", lr={f"{layers}.1": 0.0, "*": RATE})
    model.freeze(f"{layers}.0").fit(data, batch_size=BATCH, verbose=0)
    pairs = zip(net.named_parameters(), before.parameters(), strict=True)
    moved = {parameter for (parameter, now), then in pairs if not torch.equal(now, then)}
    assert moved
    assert not any(".h." in parameter or ".layer." in parameter for parameter in moved)


def test_a_term_of_ones_own_beside_the_models_loss():
    class Regularized(kt.Model):
        def compute_loss(self, batch):
            entropy = self.module.transformer.wte.weight.square().mean()
            self.log("size", entropy)
            return super().compute_loss(batch) + 0.1 * entropy

    net, data = make("GPT2LMHeadModel", dropout=0.0).double(), data_for("GPT2LMHeadModel")
    expected = copy.deepcopy(net).train()
    loss = expected(**data).loss + 0.1 * expected.transformer.wte.weight.square().mean()
    loss.backward()
    torch.optim.SGD(expected.parameters(), 0.1).step()
    model = Regularized(net, backend="cpu").compile("sgd", lr=0.1)
    history = model.fit(data, batch_size=4, accumulate=7, validation_data=data, verbose=0).history
    assert history["loss"] == [pytest.approx(loss.item(), rel=1e-6)]
    assert set(history) == {"loss", "size", "val_loss", "val_size"}
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
