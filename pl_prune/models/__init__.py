"""Networks and the LightningModule of the recipes."""

from pl_prune.models.carn import CARN as CARN
from pl_prune.models.causal_language_model import CausalLanguageModel as CausalLanguageModel
from pl_prune.models.classifier import ImageClassifier as ImageClassifier
from pl_prune.models.convnet import ConvNet as ConvNet
from pl_prune.models.detector import Detector as Detector
from pl_prune.models.question_answerer import QuestionAnswerer as QuestionAnswerer
from pl_prune.models.resnet import ResNet as ResNet
from pl_prune.models.resnet import WideResNet as WideResNet
from pl_prune.models.segmenter import SemanticSegmenter as SemanticSegmenter
from pl_prune.models.sgd import NormSGD as NormSGD
from pl_prune.models.super_resolution import SuperResolution as SuperResolution
from pl_prune.models.torchvision_vit import vit_b_16 as vit_b_16
from pl_prune.models.vgg import VGG as VGG
from pl_prune.models.vit import ViT as ViT
