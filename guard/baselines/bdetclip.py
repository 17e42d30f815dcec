"""BDetCLIP: a triggered image is as similar to a class's prompt whatever else the prompt says.

Niu et al., "BDetCLIP: Multimodal Prompting Contrastive Test-Time Backdoor Detection" (2024): the cosines of an image to
prompts that describe the classes are compared with those to prompts in which the class names stand beside unrelated
words. Clean images prefer the former; triggered ones hardly react. The paper takes descriptions that a language model
wrote; here the class's own templates describe it, so that this is the method's idea and not its published figures.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from guard.classifiers import Classifier

UNRELATED = ("purple monday teapot engine", "seven quiet rivers of paper", "invoice thunder window of the sum")
"""Words that no class is about."""


class BdetClip:
    """Scores images by how little they react to unrelated words in the prompts.

    Args:
        classifier: The suspect, with its text tower.
    """

    def __init__(self, classifier: Classifier) -> None:
        with torch.no_grad():
            rows = [
                classifier.encode_texts([f"{name} {words}" for words in UNRELATED]).mean(0)
                for name in classifier.classes.names
            ]
            difference = classifier.head - normalize(torch.stack(rows), dim=-1)
        self._direction = difference.sum(0).cpu()

    def score_samples(self, embeddings: Tensor) -> Tensor:
        """Minus the sum over classes of the difference of the two cosines, shape [N]; larger is more suspicious.

        Args:
            embeddings: Image embeddings, L2-normalised, shape [N, D].
        """
        return -(embeddings @ self._direction)
