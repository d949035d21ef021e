"""The networks that the paper's tables compare: what each sees, predicts and refuses."""

import pytest
import torch
from small_networks import BASE, SIZES, build, images, random_targets, variant_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pahm.ablation.tables import TABLES, VARIANTS, configuration
from pahm.hand.topology import HandTopology
from pahm.model import HandNet, build_network, load_checkpoint, save_checkpoint
from pahm.model.network import MeshDecoder
from pahm.train.losses import total_loss

MESHES = {
    "refine-once": (*SIZES, 778),
    "refine-three-times": (*SIZES, 778, 778, 778),
    "metro": (195, 778),
    "metro-aligned": (195, 195, 195, 778),
}
TABLE_1 = [row.variant for row in TABLES["table1"].rows]
WITHOUT_2D = ["repeat", "mlp", "mlp-attention", "aligned-without-2d"]


@pytest.fixture(scope="module")
def topology():
    return HandTopology.load()


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_predicts_trains_and_comes_back_from_its_checkpoint(variant, topology, tmp_path):
    network = build(topology, variant)
    prediction = network(images())
    assert tuple(mesh.shape[1] for mesh in prediction.meshes) == MESHES.get(variant, SIZES)
    config = configuration(BASE, variant)
    assert len(prediction.cues) == (config.model.stacks if config.model.cues else 0)
    expected = {"metro": 1, "metro-aligned": 3}.get(variant, 0)
    assert [tuple(j.shape) for j in prediction.joints] == [(2, 21, 3)] * expected
    total_loss(prediction, random_targets(), torch.as_tensor(network.faces), config.loss)[0].backward()
    parameters = dict(network.named_parameters())
    without = [n for n, p in parameters.items() if p.grad is None]
    assert without == [], "distributed training waits for every gradient"
    # Without its loss nothing asks for the silhouette; the pose still serves the first mesh.
    idle = {n for n in parameters if "silhouette_head" in n and variant in WITHOUT_2D}
    assert {n for n, p in parameters.items() if not p.grad.abs().sum() > 0} == idle
    save_checkpoint(tmp_path / "net.safetensors", network, config)
    loaded = load_checkpoint(tmp_path / "net.safetensors", expect=config)
    with torch.no_grad():
        assert torch.equal(loaded(images()).meshes[-1], network.eval()(images()).meshes[-1])


@pytest.mark.parametrize("variant", TABLE_1)
def test_rows_of_table_1_have_one_first_mesh_and_one_extractor(variant, topology):
    network, ours = build(topology, variant).eval(), build(topology, "aligned").eval()
    for part in ("extractor", "decoder.lift"):
        a, b = (net.get_submodule(part) for net in (network, ours))
        assert type(a) is type(b)
        assert {n: p.shape for n, p in a.state_dict().items()} == {
            n: p.shape for n, p in b.state_dict().items()
        }
    assert type(network.decoder) is MeshDecoder
    with torch.no_grad():
        maps, joints_2d, _ = network.extractor(images())
        before, _ = network.decoder.lift.mesh_and_camera(maps, joints_2d)
        by_image, _ = network.decoder.lift.mesh_and_camera([m + 0.5 for m in maps], joints_2d)
        by_pose, _ = network.decoder.lift.mesh_and_camera(maps, joints_2d + 0.5)
        after = network.decoder(maps, joints_2d + 0.5)[0][-1] - network.decoder(maps, joints_2d)[0][-1]
    assert before.shape == (2, 98, 3)
    for moved in (by_image - before, by_pose - before, after):
        assert moved.abs().amax(dim=2).min() > 1e-6, "every vertex moves"


def test_without_2d_only_the_losses_of_silhouette_and_pose_are_missing(topology):
    with_2d, without = (configuration(BASE, name) for name in ("aligned", "aligned-without-2d"))
    assert with_2d.model == without.model
    differ = {name for name, value in vars(with_2d.loss).items() if getattr(without.loss, name) != value}
    assert differ == {"silhouette", "pose", "position"}
    network = build(topology).eval()
    with torch.no_grad():
        prediction, faces = network(images()), torch.as_tensor(network.faces)
    targets, other = random_targets(), random_targets(seed=3)
    moved = {
        "2D": targets._replace(joints_2d=other.joints_2d, mask=other.mask),
        "projections": targets._replace(vertices_2d=other.vertices_2d),
    }
    for variant in VARIANTS:
        loss = configuration(BASE, variant).loss
        before = total_loss(prediction, targets, faces, loss)[0]
        after = {name: total_loss(prediction, t, faces, loss)[0] for name, t in moved.items()}
        assert torch.equal(before, after["2D"]) == (variant in WITHOUT_2D)
        assert not torch.equal(before, after["projections"])


def influence(network, batch):
    """For each of Q_32, Q_16, Q_8, Q_4: whether a changed pixel at the border reaches the finest mesh.

    The mean of each map and the 2D pose stay as they are, so that the global feature does not move.
    """
    maps, joints_2d, _ = network.extractor(batch)
    reached = []
    with torch.no_grad():
        before = network.decoder(maps, joints_2d)[0][-1]
        for place, feature_map in enumerate(maps):
            change = torch.randn_like(feature_map)
            changed = feature_map + change - change.mean(dim=(2, 3), keepdim=True)
            after = network.decoder([*maps[:place], changed, *maps[place + 1 :]], joints_2d)[0][-1]
            reached.append(not torch.allclose(before, after, atol=1e-6))
    return reached


@pytest.mark.parametrize(
    ("variant", "seen"),
    [
        ("repeat", [False, False, False, False]),
        ("mlp", [False, False, False, False]),
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
def test_a_global_feature_reaches_the_mesh_by_its_mapping(variant, topology):
    network = build(topology, variant).eval()
    mapped = []
    mapping = network.decoder.mapping if variant == "metro" else network.decoder.levels[0].mapping
    mapping.register_forward_hook(lambda module, inputs, output: mapped.append(output))
    with torch.no_grad():
        maps, joints_2d, _ = network.extractor(images())
        before, after = (network.decoder([m + c for m in maps], joints_2d)[0][-1] for c in (0.0, 0.5))
    assert (before - after).abs().amax(dim=(1, 2)).min() > 1e-6
    assert (mapped[0] - mapped[1]).abs().amax(dim=-1).min() > 1e-3


def test_attention_is_the_only_difference_between_the_rows_with_and_without_it(topology):
    for with_attention, without in [("mlp-attention", "mlp"), ("aligned-attention", "aligned")]:
        a, b = (
            {n: p.shape for n, p in build(topology, v).state_dict().items()}
            for v in (with_attention, without)
        )
        assert set(b) < set(a) and all(a[name] == shape for name, shape in b.items())
        assert all("attention" in name for name in set(a) - set(b))


def test_a_network_without_cues_makes_only_the_maps_that_it_reads(topology):
    for changes, count in [
        ({"mapping": "mlp"}, 1),
        ({"skips": [True, True, False, False]}, 2),
        ({"decoder": "metro"}, 3),
        ({"skips": [True, False, False, False], "refinements": 1}, 4),
        ({}, 4),
    ]:
        network = build(topology, cues=False, **changes)
        maps, joints_2d, cues = network.extractor(images())
        assert len(maps) == count and cues == [] and joints_2d.shape == (2, 0, 2)
        assert network.eval()(images()).meshes[-1].isfinite().all()


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stacks", 2),
        ("cues", False),
        ("mapping", "mlp"),
        ("skips", (True, True, True, False)),
        ("refinements", 1),
        ("decoder", "metro"),
    ],
)
def test_the_papers_network_does_not_pass_for_a_baseline(name, value, topology):
    config = variant_config(**{name: value})
    with pytest.raises(ValueError, match=rf"model\.{name}: HandNet by itself .*build_network builds") as said:
        HandNet(config.model, topology)
    assert repr(value) in str(said.value)
    assert getattr(build_network(config, topology).config, name) == value


@pytest.mark.parametrize(
    ("variant", "changes"), [("metro-aligned", {}), ("gcn-stacked", {"refinements": 1}), ("mlp", {})]
)
def test_variants_compile_to_one_graph(variant, changes, topology):
    network = build(topology, variant, **changes).eval()
    with torch.no_grad():
        eager = network(images()).meshes[-1]
        compiled = torch.compile(network, fullgraph=True, backend="aot_eager")(images()).meshes[-1]
    assert torch.allclose(eager, compiled, atol=1e-5)


@pytest.mark.parametrize("variant", ["metro", "skips-m4"])
def test_variants_are_exported_for_any_batch(variant, topology):
    network = build(topology, variant).eval()
    sizes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(network, (images(3),), dynamic_shapes=sizes).module()
    with torch.no_grad():
        for count in (1, 2):
            a, b = exported(images(count)), network(images(count))
            assert torch.allclose(a.meshes[-1], b.meshes[-1], atol=1e-6)


class NoFloat64(TorchDispatchMode):
    """Stands for a device without float64, such as Apple's: an operation that makes one fails."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                assert tensor.dtype != torch.float64, f"{func} made a float64 tensor"
        return out


@pytest.mark.parametrize("variant", ["aligned-attention", "gcn-stacked", "metro", "metro-aligned", "mlp"])
def test_no_float64_tensor_is_made_on_the_device(variant, topology):
    config = configuration(BASE, variant)
    with torch.device("meta"), NoFloat64("meta"):
        build_network(config, topology)
    network, targets = build(topology, variant), random_targets()
    faces = torch.as_tensor(network.faces)
    with NoFloat64("cpu"):
        total_loss(network(images()), targets, faces, config.loss)[0].backward()
