"""The repairs written out, in float64 by decompositions of whole matrices: a reference."""

import math

import torch


def parts(tensors):
    tensors = {role: tensor.double() for role, tensor in tensors.items()}
    aligned = tensors["aligned"]
    return aligned, tensors.get("fine_tuned", aligned), aligned - tensors["unaligned"], tensors


def resta(tensors, gamma):
    _, fine_tuned, safety, _ = parts(tensors)
    return fine_tuned + gamma * safety


def is_kept(aligned, fine_tuned, safety, threshold):
    change = fine_tuned - aligned
    if safety.dim() != 2 or safety.norm() == 0:
        return True
    projected = safety @ safety.T / safety.norm() @ change
    if projected.norm() == 0:
        return threshold <= 0
    cosine = (change * projected).sum() / (change.norm() * projected.norm())
    return cosine.item() >= threshold


def safe_lora(tensors, threshold):
    aligned, fine_tuned, safety, _ = parts(tensors)
    if is_kept(aligned, fine_tuned, safety, threshold):
        return fine_tuned
    return aligned + safety @ safety.T / safety.norm() @ (fine_tuned - aligned)


def safemerge(tensors, threshold, alpha):
    aligned, fine_tuned, safety, tensors = parts(tensors)
    if is_kept(aligned, fine_tuned, safety, threshold):
        return fine_tuned
    safety_tuned = tensors["safety_tuned"]
    return aligned + alpha * (fine_tuned - aligned) + (1 - alpha) * (safety_tuned - aligned)


def left_projection(matrix, rank):
    left, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] @ left[:, :rank].T @ matrix


def lox(tensors, alpha, rank):
    _, fine_tuned, safety, _ = parts(tensors)
    if safety.dim() != 2:
        return fine_tuned
    return fine_tuned + alpha * left_projection(safety, rank)


def lssf(tensors, alpha):
    _, fine_tuned, safety, _ = parts(tensors)
    if safety.dim() != 2 or safety.norm() == 0:
        return fine_tuned
    shares = torch.linalg.svdvals(safety) ** 2 / safety.norm() ** 2
    entropy = -sum(p * math.log(p) for p in shares.tolist() if p > 0)
    rank = math.ceil(math.exp(entropy) - 1e-6)
    return fine_tuned + alpha * left_projection(safety, rank)


def nlsr(tensors, beta, rank, share, threshold):
    aligned, fine_tuned, safety, tensors = parts(tensors)
    if safety.dim() != 2:
        return fine_tuned
    scores = left_projection(safety, rank).norm(dim=1)
    result = fine_tuned.clone()
    best = sorted(range(len(scores)), key=lambda row: -scores[row].item())
    for row in best[: math.ceil(share * len(scores) - 1e-6)]:
        change = fine_tuned[row] - tensors["unaligned"][row]
        sizes = change.norm() * safety[row].norm()
        cosine = (change @ safety[row] / sizes).item() if sizes > 0 else 0.0
        if safety[row].norm() > 0 and cosine < threshold:
            result[row] = aligned[row] + beta * safety[row]
    return result


REFERENCE = {
    "resta": resta,
    "safe_lora": safe_lora,
    "safemerge": safemerge,
    "lox": lox,
    "lssf": lssf,
    "nlsr": nlsr,
}
