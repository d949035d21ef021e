"""The image encoder: what timm gives, and what it is asked for."""

import pytest
import timm
import torch

from pahm.model.backbone import create_backbone, map_channels


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "hrnet_w64", "mobilenetv4_conv_small", "tf_efficientnet_lite0"]
)
def test_backbones_give_the_four_strides(name):
    with torch.device("meta"):
        backbone = create_backbone(name)
        maps = backbone(torch.empty(1, 3, 224, 224))
    assert [m.shape[-1] for m in maps] == [56, 28, 14, 7]
    assert [m.shape[1] for m in maps] == map_channels(backbone)


def test_backbone_weights_come_from_a_local_file(tmp_path):
    source = create_backbone("test_resnet")
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    loaded = create_backbone("test_resnet", weights=str(path))
    for (name, a), b in zip(source.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"bad\.pth does not fit 'test_resnet'"):
        create_backbone("test_resnet", weights=str(tmp_path / "bad.pth"))
    with pytest.raises(FileNotFoundError, match="no file at"):
        create_backbone("test_resnet", weights=str(tmp_path / "none.pth"))


def test_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch):
    def create(name, pretrained=False, create=timm.create_model, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr("timm.create_model", create)
    with pytest.raises(
        ConnectionError, match=r"'test_resnet' could not be downloaded.*model\.backbone_weights"
    ):
        create_backbone("test_resnet", pretrained=True)


def test_unfit_backbones_are_refused():
    with pytest.raises(ValueError, match="has no model named 'resnet19'"):
        create_backbone("resnet19")
    with pytest.raises(ValueError, match=r"gives no feature maps|has features at strides"):
        create_backbone("vit_tiny_patch16_224")
