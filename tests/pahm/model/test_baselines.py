"""The networks that the paper's tables compare: what each sees, predicts and refuses."""

import pytest
import torch

from pahm.ablation.tables import VARIANTS, configuration
from pahm.config import preset
from pahm.hand.topology import HandTopology
from pahm.model import HandNet, load_checkpoint, save_checkpoint
from pahm.model.decoder import MeshDecoder
from pahm.model.mapping import GlobalMLP, GlobalRepeat
from pahm.model.metro import EncoderBlock
from pahm.train.losses import Targets, total_loss

BASE = preset("tiny").override(
    {
        "model.pretrained": False,
        "model.backbone": "test_resnet",
        "model.image_size": 64,
        "model.transformer_channels": [32, 16, 8],
        "model.transformer_layers": 1,
    }
)
SIZES = (98, 195, 389, 778)
MESHES = {
    "refine-once": (*SIZES, 778),
    "refine-three-times": (*SIZES, 778, 778, 778),
    "metro": (195, 778),
    "metro-aligned": (195, 195, 195, 778),
}


@pytest.fixture(scope="module")
def topology():
    return HandTopology.load()


def build(topology, variant=None, **changes):
    """A variant by name, or the base with changes of `model`; weights moved off their small first values."""
    torch.manual_seed(0)
    config = configuration(BASE, variant) if variant else BASE
    config = config.override({f"model.{name}": value for name, value in changes.items()})
    network = HandNet(config.model, topology)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def images(count=2):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_predicts_trains_and_comes_back_from_its_checkpoint(variant, topology, tmp_path):
    network = build(topology, variant)
    prediction = network(images())
    assert tuple(mesh.shape[1] for mesh in prediction.meshes) == MESHES.get(variant, SIZES)
    config = configuration(BASE, variant)
    assert len(prediction.cues) == (config.model.stacks if config.model.cues else 0)
    expected = {"metro": 1, "metro-aligned": 3}.get(variant, 0)
    assert [tuple(j.shape) for j in prediction.joints] == [(2, 21, 3)] * expected
    torch.manual_seed(2)
    targets = Targets(
        [0.1 * torch.randn(2, n, 3) for n in SIZES],
        [torch.rand(2, n, 2) for n in SIZES],
        0.1 * torch.randn(2, 21, 3),
        torch.rand(2, 21, 2),
        torch.rand(2, 1, 64, 64).round(),
        torch.tensor([True, True]),
    )
    total_loss(prediction, targets, torch.as_tensor(network.faces), config.loss)[0].backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == [], "distributed training waits for every gradient"
    save_checkpoint(tmp_path / "net.safetensors", network, config)
    loaded = load_checkpoint(tmp_path / "net.safetensors", expect=config)
    with torch.no_grad():
        assert torch.equal(loaded(images()).meshes[-1], network.eval()(images()).meshes[-1])


def influence(network, batch):
    """For each of Q_32, Q_16, Q_8, Q_4: whether a changed pixel at the border reaches the finest mesh.

    The mean of each map stays as it is, so that the global feature does not move.
    """
    maps, cues = network.extractor(batch)
    joints = None if not cues else torch.zeros(len(batch), 21, 2)
    reached = []
    with torch.no_grad():
        before = network.decoder(maps, joints)[0][-1]
        for place, feature_map in enumerate(maps):
            change = torch.randn_like(feature_map)
            changed = feature_map + change - change.mean(dim=(2, 3), keepdim=True)
            after = network.decoder([*maps[:place], changed, *maps[place + 1 :]], joints)[0][-1]
            reached.append(not torch.allclose(before, after, atol=1e-6))
    return reached


@pytest.mark.parametrize(
    ("variant", "seen"),
    [
        ("repeat", [False]),
        ("mlp", [False]),
        ("metro", [False]),
        ("aligned-without-2d", [True, True, True, True]),
        ("aligned", [True, True, True, True]),
        ("skips-m4", [True, False, False, False]),
        ("skips-m4-m3", [True, True, False, False]),
        ("skips-m4-m2", [True, True, True, False]),
        ("refine-once", [True, True, True, True]),
        ("refine-three-times", [True, True, True, True]),
        ("metro-aligned", [True, True, True, False]),
    ],
)
def test_local_features_reach_the_mesh_by_the_maps_that_the_variant_samples(variant, seen, topology):
    assert influence(build(topology, variant).eval(), images()) == seen


@pytest.mark.parametrize("variant", ["repeat", "mlp", "metro"])
def test_a_global_feature_reaches_the_mesh(variant, topology):
    network = build(topology, variant).eval()
    with torch.no_grad():
        maps, _ = network.extractor(images())
        before, after = (network.decoder([m + c for m in maps], None)[0][-1] for c in (0.0, 0.5))
    assert (before - after).abs().amax(dim=(1, 2)).min() > 1e-6


def test_attention_is_the_only_difference_between_the_rows_with_and_without_it(topology):
    for with_attention, without in [("mlp-attention", "mlp"), ("aligned-attention", "aligned")]:
        a, b = (
            {n: p.shape for n, p in build(topology, v).state_dict().items()}
            for v in (with_attention, without)
        )
        assert set(b) < set(a) and all(a[name] == shape for name, shape in b.items())
        assert all("attention" in name for name in set(a) - set(b))


def test_refinements_start_from_the_mesh_of_a_decoder_that_sees_the_image_at_m4_only(topology):
    rough, refined = build(topology, "skips-m4").eval(), build(topology, "refine-three-times").eval()
    missing = refined.load_state_dict(rough.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("decoder.refine.") for name in missing)
    with torch.no_grad():
        a, b = rough(images()), refined(images())
    for x, y in zip(a.meshes, b.meshes, strict=False):
        assert torch.equal(x, y)
    steps = [(y - x).abs().max().item() for x, y in zip(b.meshes[3:], b.meshes[4:], strict=False)]
    assert len(steps) == 3 and min(steps) > 1e-6


def test_the_second_hourglass_reads_the_cues_of_the_first(topology):
    network = build(topology, "gcn-stacked").eval()
    with torch.no_grad():
        maps, (first, second) = network.extractor(images())
        assert [tuple(m.shape[1:]) for m in maps] == [(128, 2, 2), (96, 4, 4), (64, 8, 8), (48, 16, 16)]
        assert not torch.allclose(first.pose_logits, second.pose_logits)
        for head in (network.extractor.pose_head, network.extractor.silhouette_head):
            before = network.extractor(images())[1][1].pose_logits
            head[-1].bias.add_(2.0)
            assert not torch.allclose(network.extractor(images())[1][1].pose_logits, before)


def test_global_mappings():
    features = torch.randn(2, 5, 3, 3)
    mean = features.mean(dim=(2, 3))
    repeated = GlobalRepeat()(features, torch.zeros(2, 7, 3), torch.zeros(2, 3))
    assert torch.equal(repeated, mean[:, None].repeat(1, 7, 1))
    mlp = GlobalMLP(5, 7, 4)
    out = mlp(features, torch.zeros(2, 7, 3), torch.zeros(2, 3))
    assert out.shape == (2, 7, 4)
    # Features of vertex n are the n-th group of the last layer's outputs.
    assert torch.allclose(out[:, 3], mlp.layers(mean)[:, 12:16])


def test_metro_predicts_as_published(topology):
    network = build(topology, "metro")
    decoder = network.decoder
    up = (topology.hierarchy.up[0] @ topology.hierarchy.up[1]).toarray()
    fresh = HandNet(configuration(BASE, "metro").model, topology).decoder.upsample
    assert torch.allclose(fresh.weight, torch.as_tensor(up, dtype=torch.float32))
    assert [block.embed.out_features for block in decoder.blocks] == [32, 16, 8]
    assert [block.reduce.out_features for block in decoder.blocks] == [16, 8, 3]
    assert decoder.template.shape == (21 + 195, 3)
    # The joints of the template are those that the regressor finds on the finest mesh, up to its coarsening.
    fine = topology.hierarchy.vertices[0]
    root = topology.joint_regressor[9] @ fine
    joints = torch.as_tensor((topology.joint_regressor @ fine - root) / 0.2, dtype=torch.float32)
    assert (decoder.template[:21] - joints).abs().max() < 0.02


def test_masked_vertex_modelling_hides_up_to_about_three_in_ten_queries_and_only_in_training(topology):
    decoder = build(topology, "metro").decoder
    queries = torch.randn(400, 216, 4)
    hidden = (decoder.train()._hide(queries) == 0.01).all(-1).float().mean(1)
    assert hidden.max() < 0.45 and 0.12 < hidden.mean() < 0.18 and hidden.min() < 0.02
    assert torch.equal(decoder.eval()._hide(queries), queries)


def test_encoder_block_tells_queries_apart_and_joins_them():
    block = EncoderBlock(6, 8, 4, queries=5, layers=1, heads=2).eval()
    x = torch.randn(1, 1, 6).repeat(1, 5, 1).requires_grad_()
    out = block(x)
    assert out.shape == (1, 5, 4) and not torch.allclose(out[0, 0], out[0, 1])
    (gradient,) = torch.autograd.grad(out[0, 0].sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()
    one, two = EncoderBlock(6, 8, 4, queries=5, layers=2, heads=2).encoder.layers
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        assert first.dim() == 1 or not torch.equal(first, second), name
    with pytest.raises(ValueError, match="8 channels cannot be split over 3 heads"):
        EncoderBlock(6, 8, 4, 5, 1, 3)


def test_a_network_without_cues_makes_only_the_maps_that_it_reads(topology):
    for changes, count in [({"mapping": "mlp"}, 1), ({"skips": [True, True, False, False]}, 2), ({}, 4)]:
        maps, cues = build(topology, cues=False, **changes).extractor(images())
        assert len(maps) == count and cues == []


def test_combinations_that_mean_nothing_are_refused(topology):
    with pytest.raises(ValueError, match=r"model\.stacks: two hourglasses need model\.cues"):
        build(topology, stacks=2, cues=False)
    with pytest.raises(
        ValueError, match=r"model\.refinements: 3 need model\.mapping pixel_aligned, got 'mlp'"
    ):
        build(topology, refinements=3, mapping="mlp")
    with pytest.raises(ValueError, match=r"'repeat'.*or 'pixel_aligned', got 'mlp'"):
        build(topology, decoder="metro", mapping="mlp")
    with pytest.raises(ValueError, match=r"model\.decoder: METRO has no model\.refinements"):
        build(topology, decoder="metro", refinements=1)
    with pytest.raises(ValueError, match=r"model\.skips: METRO's blocks have all of them"):
        build(topology, decoder="metro", skips=[True, True, False, False])


@pytest.mark.parametrize("variant", ["metro-aligned", "refine-once", "gcn-stacked", "mlp"])
def test_variants_compile_to_one_graph(variant, topology):
    network = build(topology, variant).eval()
    with torch.no_grad():
        eager = network(images()).meshes[-1]
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(images()).meshes[-1]
    assert torch.allclose(eager, compiled, atol=1e-5)


def test_the_decoders_share_one_first_mesh(topology):
    assert type(build(topology).decoder) is MeshDecoder
    a, b = build(topology).decoder.lift, build(topology, "metro-aligned").decoder.lift
    assert {n: p.shape for n, p in a.state_dict().items()} == {n: p.shape for n, p in b.state_dict().items()}
    for variant in ("repeat", "metro"):
        lift = build(topology, variant).decoder.lift
        mesh, _ = lift(torch.randn(2, 128, 2, 2), None)
        assert torch.equal(mesh, lift.template.expand(2, -1, -1)), (
            "global features reach no vertex by the lift"
        )
