"""Would the tests notice a wrong line? Mutants of the package, each with a test that must fail under it.

``python tests/mutants.py [NAME ...]`` (default: all) copies the package, the tests and their data to a temporary
folder, changes one text there and runs the tests of this mutant. The unchanged copy passes the same tests first.
``make test`` checks that every text still occurs once (tests/test_mutants.py).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fa", "tests", "data/claims", "data/records", "data/reference")
LIBRARIES = ["torch", "pandas", "matplotlib.pyplot", "hypothesis", "pytest"]  # imported once, before the forks


class Mutant(NamedTuple):
    """A wrong line: in the package's ``file`` the ``text``, which occurs once, becomes ``wrong``.

    ``tests`` are pytest's ids below tests/, separated by spaces; each test must fail, in one of its cases at least.
    """

    name: str
    file: str
    text: str
    wrong: str
    tests: str


MUTANTS = [
    # ------------------------------------------------------------------------------------------------------------ rules
    Mutant("bound of a uniform draw", "rules/base.py", "bound = math.sqrt(3.0) * std", "bound = math.sqrt(2.0) * std",
           "test_rules.py::test_feedback_scales"),
    Mutant("fan_in and fan_out swapped", "rules/base.py", "return W.shape[1] * receptive, W.shape[0] * receptive",
           "return W.shape[0] * receptive, W.shape[1] * receptive", "test_rules.py::test_feedback_scales"),
    Mutant("scale of Xavier", "rules/base.py", '"xavier": 2 / max(', '"xavier": 1 / max(',
           "test_rules.py::test_feedback_scales"),
    Mutant("feedback that starts as W is W", "rules/base.py", "W.detach().clone(memory_format=torch.contiguous_format)", "W.detach()",
           "test_rules.py::test_feedback_that_starts_as_a_copy_of_the_weight[mlp]"),
    Mutant("zeros and ones of a mask swapped", "rules/base.py", "< density).to(like)", ">= density).to(like)",
           "test_rules.py::test_sparse_feedback_has_its_density_and_is_not_rescaled"),
    Mutant("mask dropped from the kernel", "rules/base.py", "[(A, M * mask, *c)", "[(A, M, *c)",
           "test_local_rules.py::test_sparse_feedback_carries_errors_on_the_entries_that_exist"),
    Mutant("number of a term dropped", "rules/base.py", "torch.addcmul(K, c, M",
           "torch.addcmul(K, torch.ones_like(c), M", "test_rules.py::test_implicit_feedback_is_the_explicit_one"),
    Mutant("magnitudes of track by the mean", "rules/fixed.py", "W.square().mean().sqrt() if", "W.abs().mean() if",
           "test_rules.py::test_any_linear_layer"),
    Mutant("signs wrong in the share that is right", "rules/fixed.py", "s * (2 * random_mask", "-s * (2 * random_mask",
           "test_rules.py::test_angle_that_a_rule_has_by_construction"),
    Mutant("magnitudes that have signs", "rules/fixed.py", "M.abs() * W.sign()", "M * W.sign()",
           "test_local_rules.py::test_angles_by_construction"),
    Mutant("dense feedback transposed", "rules/fixed.py", "reversed(op.sizes)", "op.sizes",
           "test_local_rules.py::test_dense_feedback_is_a_matrix_between_flattened_maps"),
    Mutant("size of dense feedback by the outputs", "rules/fixed.py", "W[0].numel() / shape[1]",
           "W[0].numel() / shape[0]", "test_local_rules.py::test_dense_feedback_scale"),
    Mutant("copy refreshed a step late", "rules/fixed.py", "step % self.every:", "(step - 1) % self.every:",
           "test_local_rules.py::test_refresh_schedule"),
    Mutant("feedback learns away from W", "rules/product.py", 'return {"B": dW}', 'return {"B": -dW}',
           "test_rules.py::test_kp_mismatch_decays_geometrically"),
    Mutant("B not rescaled for its density", "rules/product.py", "math.sqrt(mid * self.density)", "math.sqrt(mid)",
           "test_rules.py::test_fixed_matrix_has_identity_expectation"),
    Mutant("orthogonal matrix that is not uniform", "rules/product.py", "B = (Q * signs.unsqueeze(-2)).to(like)",
           "B = Q.to(like)", "test_rules.py::test_orthogonal_matrix_is_orthogonal"),
    Mutant("fan_out of R without the expansion", "rules/product.py", "fan_out * mid / W.shape[0]", "fan_out",
           "test_rules.py::test_path_norm_ratio_at_the_start_is_the_papers"),
    Mutant("factor 2 of the decay missing", "rules/estimation.py", '{"B": 2 * self.decay * B', '{"B": self.decay * B',
           "test_local_rules.py::test_feedback_descends_the_published_regulariser"),
    Mutant("Hebbian term with the other sign", "rules/estimation.py", "up(p * B).sub_(y, alpha=a)",
           "up(p * B).add_(y, alpha=a)", "test_local_rules.py::test_rectified_projection"),
    Mutant("factor 2 of the null term missing", "rules/estimation.py", "a, n, p = self.amp, 2 * self.null",
           "a, n, p = self.amp, self.null", "test_local_rules.py::test_feedback_descends_the_published_regulariser"),
    Mutant("sparse term missing beside the null term", "rules/estimation.py",
           "data + op.grad_weight(x, up(p * B), W) if p else data", "data",
           "test_local_rules.py::test_rectified_projection"),
    Mutant("centred over the batch", "rules/estimation.py", "flat.mean(1, keepdim=True)", "flat.mean(0, keepdim=True)",
           "test_local_rules.py::test_centred_and_normalised_input"),
    Mutant("sum and mean over positions swapped", "rules/estimation.py", 'self.positions == "mean" or',
           'self.positions == "sum" or', "test_local_rules.py::test_feedback_descends_the_published_regulariser"),
    Mutant("rectifier dropped", "rules/estimation.py", "y = torch.relu(y) if self.activation else y", "y = y",
           "test_local_rules.py::test_rectified_projection"),
    Mutant("decay in the gradient and in the optimizer", "rules/estimation.py", "own_decay = True", "own_decay = False",
           "test_local_rules.py::test_own_decay_feedback_has_a_group_of_its_own"),
    # ----------------------------------------------------------------------------------------------------------- layers
    Mutant("tracked norm upside down", "layers/feedback.py",
           "K * (torch.linalg.vector_norm(W) / size.clamp_min(torch.finfo(size.dtype).tiny))",
           "K * (size / torch.linalg.vector_norm(W))", "test_rules.py::test_any_linear_layer"),
    Mutant("bias within y", "layers/passes.py", "out if b is None else out - b.view(-1, *[1] * (W.dim() - 2))", "out",
           "test_local_rules.py::test_feedback_descends_the_published_regulariser"),
    Mutant("y saved as the next layer may leave it", "layers/passes.py", "ctx.version[0]._version != ctx.version[1]",
           "False", "test_local_rules.py::test_the_next_layer_may_work_in_place"),
    Mutant("feedback learns beside a frozen weight", "layers/passes.py",
           'not fb.use_backprop and (need_W or "dW" not in fb.grad_args)', "not fb.use_backprop",
           "test_convert.py::test_feedback_that_follows_the_weights_update_rests_while_the_weight_is_frozen"),
    Mutant("number of a term dropped for few samples", "layers/feedback.py",
           "(dy * c[0].flatten()).to(dy.dtype) if c else dy", "dy",
           "test_rules.py::test_implicit_feedback_is_the_explicit_one"),
    Mutant("one draw for all layers and steps", "layers/feedback.py", "map(str, (seed, *labels))", "map(str, (seed,))",
           "test_local_rules.py::test_magnitudes_change_once_in_every_optimizer_step_and_only_then"),
    Mutant("steps are not loaded", "layers/feedback.py", "known if buffer is self.step and version == buffer._version else",
           "known if True else", "test_rules.py::test_a_loaded_network_redraws_as_the_saved_one_would"),
    Mutant("noise with another variance", "layers/maps.py", "bound = 3**0.5 * std", "bound = 2**0.5 * std",
           "test_local_rules.py::test_noise_is_distributed_as_it_is_said_to_be"),
    Mutant("order of the layers", "layers/convert.py", "enumerate(layers.items())",
           "enumerate(reversed(layers.items()))",
           "test_rules.py::test_implicit_training_equals_explicit_training[pfa-0.5-first-plain]"),
    Mutant("height and width of the padding swapped", "layers/maps.py", '"padding": pad[2::-2]', '"padding": pad[:3:2]',
           "test_rules.py::test_any_convolution"),
    Mutant("optimizer decays feedback that decays itself", "layers/convert.py",
           '"lr": feedback_lr, **_OWN', '"lr": feedback_lr, **_OWN, "weight_decay": weight_decay',
           "test_convert.py::test_param_groups_add_no_decay_to_feedback_that_has_its_own"),
    Mutant("an objective of the feedback's own is maximized", "layers/convert.py", '"maximize": False, ', "",
           "test_own_step.py::test_A08_feedback_moves_alike_where_a_loss_is_minimized_and_where_its_negative_is_maximized"),
    Mutant("the error of probabilities", "layers/tape.py", 'if kind in ("LogSoftmax"', 'if kind in ("Nothing"',
           "test_dfa.py::test_A11_a_network_that_ends_in_probabilities_is_refused_for_their_error_is_none_of_logits"),
    Mutant("clamped norm upside down", "layers/steps.py", "fb.forward_norm / size", "size / fb.forward_norm",
           "test_convert.py::test_clamp_forward_holds_the_norm_after_every_step"),
    Mutant("a weight read elsewhere trains unnoticed", "layers/hooks.py", "        if why:", "        if False:",
           "test_convert.py::test_a_weight_read_by_another_module_raises"),
    Mutant("a weight read beside its layer trains unnoticed", "layers/feedback.py", "- version == made - 1", "- version >= 0",
           "test_own_step.py::test_A03_a_weight_read_before_its_layer_runs_is_refused"),
    Mutant("gradients of an earlier pass count", "layers/passes.py", "made * (task == last) + 1", "made + 1",
           "test_own_step.py::test_A03_a_weight_read_before_its_layer_runs_is_refused"),
    Mutant("the watch stays behind in a swap", "layers/hooks.py", "p._backward_hooks = p._backward_hooks", "pass",
           "test_own_step.py::test_A20_the_watch_survives_what_becomes_of_the_weight"),
    Mutant("matrices that could not be told unnoticed", "layers/targets.py", "others.append((m, key, t))", "pass",
           "test_passes.py::test_A07_a_matrix_that_could_not_be_told_is_refused_where_activity_meets_it"),
    Mutant("layers that come later unnoticed", "layers/hooks.py", "isinstance(parent, Watched) or within(name, skip)", "True",
           "test_passes.py::test_A07_a_layer_that_came_after_the_conversion_is_refused_by_name"),
    Mutant("layers that are put into a place left out", "layers/hooks.py", "or within(name, skip)", "or False",
           "test_passes.py::test_A07_a_layer_that_came_after_the_conversion_is_refused_by_name"),
    Mutant("layers in plain lists unnoticed", "layers/targets.py", "hidden = isinstance(value, nn.Module) and depth",
           "hidden = False and depth",
           "test_passes.py::test_A07_a_matrix_in_a_plain_list_or_dict_is_refused_by_name"),
    Mutant("geometry set after conversion unnoticed", "layers/hooks.py",
           "if op.told != (self.stride, self.padding, self.dilation):", "if False:",
           "test_silent.py::test_A06_the_geometry_of_a_convolution_may_be_set_at_any_time"),
    Mutant("a penalty on a gradient without effect", "layers/passes.py", "if not torch.is_grad_enabled():", "if True:",
           "test_silent.py::test_A29_a_penalty_on_a_gradient_is_refused_and_never_without_effect"),
    Mutant("a pass within a pass of direct feedback", "layers/tape.py", "if self.taps is not None:", "if False:",
           "test_silent.py::test_A12_a_network_that_calls_itself_is_refused_where_the_error_would_miss_the_first_call"),
    Mutant("a second decay untold", "layers/steps.py", "if any(g.get(k, 0) != meant", "if False and any(g.get(k, 0) != meant",
           "test_silent.py::test_A08_a_weight_decay_of_feedback_that_has_its_own_is_told"),
    Mutant("local feedback is divided by the loss scale", "layers/steps.py", "p.grad.mul_(scale", "p.grad.div_(scale",
           "test_own_step.py::test_A01_feedback_moves_alike_with_and_without_a_loss_scale"),
    Mutant("local feedback is clipped as divided", "layers/steps.py", "_rescale(optimizer, 1 / inv_scale)", "pass",
           "test_own_step.py::test_A01_gradients_are_clipped_alike_with_and_without_a_loss_scale"),
    Mutant("a step within a step counts twice", "layers/steps.py", "group_of.pop(p, None)", "pass",
           "test_own_step.py::test_A05_a_step_within_a_step_counts_once"),
    Mutant("feedback without an optimizer raises a step late", "layers/steps.py", "steps_alone > 0",
           "steps_alone > 1", "test_convert.py::test_feedback_that_no_optimizer_holds_raises_at_the_second_step"),
    Mutant("direct feedback with its kernel flipped", "layers/tape.py", "[i - dilation * k",
           "[i + dilation * k", "test_dfa.py::test_conv_net_by_hand"),
    Mutant("error on circular padding left out", "layers/tape.py", '"circular": lambda i, n: i % n',
           '"circular": lambda i, n: i', "test_silent.py::test_direct_feedback_passes_any_padding"),
    Mutant("direct error with the other sign", "layers/tape.py", "return e, *[e] * ctx.taps",
           "return e, *[-e] * ctx.taps", "test_dfa.py::test_mlp_by_hand"),
    Mutant("blocks are not cut", "layers/tape.py", 'if hasattr(feedback, "tape") and', "if False and",
           "test_dfa.py::test_a_block_that_is_cut_adds_no_error_of_its_skip"),
    Mutant("last columns of the shared matrix", "layers/dfa.py", "shared[:, : math.prod(shape[1:])]",
           "shared[:, -math.prod(shape[1:]) :]", "test_dfa.py::test_one_matrix_is_sliced_for_every_layer"),
    Mutant("axes of an output exchanged unnoticed", "layers/tape.py", "exchanged = len(", "exchanged = False and len(",
           "test_passes.py::test_A11_classes_before_tokens_are_refused_also_where_there_are_as_many"),
    Mutant("matrices of unknown classes unnoticed", "layers/targets.py", "loose.setdefault(", "{}.setdefault(",
           "test_passes.py::test_A07_a_trained_matrix_of_an_unknown_class_is_refused_by_name"),
    Mutant("weights in the dtype of any input", "layers/passes.py", "lowered(W, autocast_dtype(W.device))", "cast(W, x)",
           "test_passes.py::test_A06_an_input_of_another_dtype_is_refused_where_the_stock_layer_refuses_it"),
    Mutant("exact backprop forgotten by a checkpoint", "layers/feedback.py",
           "passes.ExactBackward if self.use_backprop else passes.LocalBackward", "passes.LocalBackward",
           "test_passes.py::test_A27_exact_backprop_holds_for_a_pass_that_a_checkpoint_runs_again_later"),
    Mutant("queries, keys and values in another order", "layers/attention.py", "self.bias_rows if together",
           "slice((2 - i) * e, (3 - i) * e) if together", "test_attention.py::test_values_without_a_batch"),
    Mutant("scores of attention by the whole width", "layers/attention.py", "self.head_dim**-0.5",
           "self.embed_dim**-0.5", "test_attention.py::test_values_without_a_batch"),
    # ---------------------------------------------------------------------------------------------------------- metrics
    Mutant("angle of the absolute cosine", "metrics.py", "cosine = a @ b / (", "cosine = (a @ b).abs() / (",
           "test_metrics.py::test_angle_is_numpys"),
    Mutant("median over samples", "metrics.py", ".nanmean()", ".nanmedian()",
           "test_metrics.py::test_sample_angle_is_the_mean_over_samples"),
    Mutant("norm ratio upside down", "metrics.py", "torch.linalg.vector_norm(K) / torch.linalg.vector_norm(W)",
           "torch.linalg.vector_norm(W) / torch.linalg.vector_norm(K)", "test_metrics.py::test_alignment_is_numpys"),
    Mutant("local angle against another layer's error", "metrics.py", "delta[name])[0], through_W)",
           "delta_bp[name])[0], through_W)", "test_metrics.py::test_angles_by_hand"),
    Mutant("global angle of an error with itself", "metrics.py", "_sample_angle(delta[name], delta_bp[name])",
           "_sample_angle(delta[name], delta[name])", "test_metrics.py::test_angles_by_hand"),
    Mutant("measuring moves running statistics", "metrics.py", "v.data.copy_(buffers[k])", "pass",
           "test_metrics.py::test_measuring_changes_nothing"),
    Mutant("what is left of the mismatch without momentum", "theory.py", "v = momentum * v + decay * D",
           "v = decay * D",
           "test_theory.py::test_what_is_left_of_the_mismatch_is_what_sgd_leaves_of_a_weight_without_gradient"),
    Mutant("decay without the momentum that is left", "theory.py", "return D - lr * momentum / (1 - momentum) * v",
           "return D", "test_theory.py::test_the_decay_leaves_the_share_that_was_asked_for"),
    Mutant("composition without its kernel", "check.py", "sent = f(x, K)", "sent = f(x, W.detach())",
           "test_check.py::test_the_published_rules_are_right"),
    Mutant("CKA with the diagonal", "train/similarity.py", "K, L = K.clone().fill_diagonal_(0), L.clone().fill_diagonal_(0)",
           "K, L = K.clone(), L.clone()", "test_metrics.py::test_cka_is_the_u_statistic_over_four_samples"),
    Mutant("PyTorch's initial weights, too wide", "train/network.py", '"torch": 1 / (3 * fan_in)', '"torch": 1 / fan_in',
           "test_models.py::test_pytorchs_initial_weights_are_those_of_its_layers"),
    Mutant("momentum of the feedback is that of W", "train/step.py", 'groups[-1]["momentum"]', 'groups[0]["momentum"]',
           "test_lag.py::test_feedback_momentum_is_that_of_own_decay_feedback_alone"),
    Mutant("a claim cut at a comma in parentheses", "results/markdown.py", '.partition("(")[0]', "",
           "test_report.py::test_what_every_claim_begins_with_is_said_once"),
    Mutant("He's initial weights, too small", "train/network.py", '"he": 2 / fan_in', '"he": 1 / fan_in',
           "test_models.py::test_he_start_keeps_the_size_of_activity"),
    Mutant("size of an error with itself", "metrics.py", "float64(delta_bp[name]).norm()", "float64(delta[name]).norm()",
           "test_metrics.py::test_angles_by_hand"),
    Mutant("kernels of places mixed up", "models.py", ".mT.flatten(1)  # -> (n, places", ".flatten(1)  # -> (n, places",
           "test_models.py::test_a_stack_without_weight_sharing_is_the_stack_where_all_places_have_one_kernel"),
    Mutant("gain dropped", "layers/feedback.py", "return K * self.rule.gain if self.gains else K", "return K",
           "test_rules.py::test_a_gain_multiplies_the_kernel"),
    Mutant("gain lost where samples are few", "layers/feedback.py", 'self.gains or self.rule.norm != "fixed"',
           'self.rule.norm != "fixed"', "test_rules.py::test_linear_layer_equals_autograd_of_the_rule"),
    Mutant("noise of another variance", "train/step.py", "self.config.update_noise**0.5", "self.config.update_noise",
           "test_noise.py::test_noise_moves_what_it_should_by_the_rate_times_its_root_variance"),
    Mutant("noise on what rests", "train/step.py", 'if group["own_decay"] is not resting:', "if True:",
           "test_noise.py::test_noise_rests_with_the_part_that_rests"),
    Mutant("the same noise in every epoch", "train/step.py", '"update noise", epoch)', '"update noise", 0)',
           "test_noise.py::test_noise_is_new_in_every_epoch"),
    Mutant("all ranks train one part", "train/ddp.py", "x.chunk(self.size, -1)[self.rank]", "x.chunk(self.size, -1)[0]",
           "test_ddp.py::test_a_run_of_two_ranks_has_the_table_of_one_process"),
    Mutant("all ranks draw one part of the noise", "train/ddp.py", "*args).chunk(self.size)[self.rank]  # of",
           "*args).chunk(self.size)[0]  # of",
           "test_ddp.py::test_two_ranks_have_the_gradients_of_one_process_with_the_whole_batch"),
    Mutant("batch norm counts a rank's images", "train/ddp.py", "x.numel() // x.shape[1] * dist.get_world_size()",
           "x.numel() // x.shape[1]", "test_ddp.py::test_a_run_of_two_ranks_has_the_table_of_one_process"),
    Mutant("ranks meet who is gone", "train/meeting.py", 'store.check([f"{word} {r}" for r in range(size)])', "word",
           "test_ddp.py::test_a_rank_that_is_gone_is_not_met"),
    Mutant("ranks meet under the word of earlier ones", "train/meeting.py", '{"identity": uuid.uuid4().hex}', "{}",
           "test_ddp.py::test_a_rank_that_is_gone_is_not_met"),
    Mutant("ranks compare the number of photographs", "train/data.py", "path[len(str(folder)) :] for part", "'' for part",
           "test_ddp.py::test_ranks_compare_the_files_of_a_data_set"),
    Mutant("Architecture 1 without a ReLU", "models.py", "x = torch.relu(F.max_pool2d(conv(x), 2))  # as",
           "x = F.max_pool2d(conv(x), 2)  # as", "test_models.py::test_architecture_1_by_hand"),
    Mutant("dense DFA scaled as a kernel", "layers/dfa.py", 'own = torch.empty(shape, device="meta")',
           'own = torch.empty(W.shape, device="meta")', "test_dfa.py::test_dense_feedback_can_have_noklands_scale"),
    # ------------------------------------------------------------------------------------------------------------ train
    Mutant("Adam's first rate", "train/step.py", "betas=(config.momentum, 0.999)", "betas=(0.99, 0.999)",
           "test_train.py::test_adam_by_hand"),
    Mutant("chosen by test accuracy", "train/measure.py", "best = max(val, key=val.get", "best = max(test, key=test.get",
           "test_train.py::test_the_chosen_epoch_is_the_first_of_the_best_validation_accuracy"),
    Mutant("black border in place of the image's own", "train/step.py", "self.pad, self.train.margin)", "self.pad)",
           "test_data.py::test_the_trainer_crops_where_it_augments_and_takes_the_middle_else"),
    Mutant("weights of the wrong network", "train/similarity.py", "for text in (self.network, self.reference, self.another)",
           "for text in (self.reference, self.network, self.another)",
           "test_p1.py::test_similarity_trains_what_it_needs_and_compares_those_networks"),
    Mutant("decay for every rule", "experiments/p1_accuracy.py", 'decay = 1e-4 if variant == "bp" else 0.0',
           "decay = 1e-4", "test_p1.py::test_the_grid_is_the_sources_set_up"),
    Mutant("learning rate drops an epoch late", "train/config.py", "epoch >= e for e", "epoch > e for e",
           "test_train.py::test_schedule"),
    Mutant("a task step too few between mirror steps", "train/config.py", "step % (self.alternate + 1)",
           "step % self.alternate", "test_phases.py::test_phases_are_two_optimizers_that_take_turns[3-0-wm]"),
    Mutant("momentum moves what rests", "train/step.py", "p.grad = None", "p.grad.zero_()",
           "test_phases.py::test_what_rests_does_not_move_at_all[1-0]"),
    Mutant("one order of batches for all epochs", "train/step.py", 'generator(seed, "order", epoch)',
           'generator(seed, "order", 0)',
           "test_train.py::test_the_same_seed_gives_the_same_start_and_the_same_batches_under_every_rule"),
    Mutant("one augmentation for all epochs", "train/photos.py", "(seed, epoch) if augment", "(seed, 0) if augment",
           "test_data.py::test_a_crop_depends_on_seed_epoch_and_image_alone"),
    Mutant("learning rate of feedback never drops", "train/step.py", 'config.feedback_lr * now["lr"] / config.lr',
           "config.feedback_lr", "test_engine.py::test_the_feedbacks_own_learning_rate"),
    Mutant("one seed for all runs", "train/network.py", 'generator(config.seed, "weights")', 'generator(0, "weights")',
           "test_train.py::test_the_same_seed_gives_the_same_start_and_the_same_batches_under_every_rule"),
    Mutant("images mirrored upside down", "train/data.py", "x.flip(-1), x)", "x.flip(-2), x)",
           "test_data.py::test_augmentation_equals_the_per_image_reference"),
    Mutant("last corner of the crops left out", "train/data.py", "torch.randint(2 * pad + 1,", "torch.randint(2 * pad,",
           "test_data.py::test_augmentation_draws_every_shift_and_both_mirrorings_for_each_image"),
    Mutant("checksum of data skipped", "train/data.py", "usedforsecurity=False).hexdigest() != md5",
           "usedforsecurity=False).hexdigest() == ''", "test_data.py::test_a_changed_byte_is_noticed"),
    Mutant("divided before the mean is taken off", "train/data.py", ".sub_(mean).div_(sd)", ".div_(sd).sub_(mean)",
           "test_data.py::test_digits_normalisation_is_the_training_split_s"),
    Mutant("a diverged run trains its epoch out", "train/step.py", "asked = 1 if", "asked = 10**9 if",
           "test_train.py::test_a_run_that_diverges_is_recorded_as_such"),
    Mutant("epoch of a divergence off by one", "train/loop.py", 'state="diverged", epoch=epoch + 1',
           'state="diverged", epoch=epoch', "test_train.py::test_a_run_that_diverges_is_recorded_as_such"),
    Mutant("momentum not taken from the checkpoint", "train/loop.py",
           'self.opt.load_state_dict(checkpoint["optimizer"])', "pass",
           "test_train.py::test_a_run_that_is_stopped_several_times_equals_one_that_is_not[pfa]"),
    Mutant("accuracy in train mode", "train/measure.py", "net.eval()", "net.train()",
           "test_train.py::test_accuracy_by_hand"),
    # -------------------------------------------------------------------------------------------------- claims, records
    Mutant("sd with ddof 0", "results/selection.py", "seeds.std(ddof=1)", "seeds.std(ddof=0)",
           "test_claims.py::test_sd_has_ddof_one_and_none_of_its_own"),
    Mutant("a seed with fewer rows counts", "results/selection.py", "count[which] == count.max(initial=0)",
           "count[which] > 0", "test_claims.py::test_a_seed_with_fewer_rows_than_the_fullest_is_left_out"),
    Mutant("numbers of whole ones rounded", "results/selection.py", "rtol=0 if whole else 5e-3", "rtol=5e-3",
           "test_claims.py::test_whole_numbers_agree_exactly_and_others_to_half_a_percent"),
    Mutant("sds added", "results/selection.py", "math.hypot(self.sd, other.sd)", "self.sd + other.sd",
           "test_claims.py::test_statistics_by_hand"),
    Mutant("paired difference with the other sign", "results/selection.py",
           '(seeds - self.seeds(metric, axes | minus, "mean"))', '(self.seeds(metric, axes | minus, "mean") - seeds)',
           "test_claims.py::test_statistics_by_hand"),
    Mutant("mismatch without its cosine", "results/selection.py", "1 + r**2 - 2 * r * cosine", "1 + r**2 - 2 * r",
           "test_claims.py::test_mismatch_is_the_norm_of_the_difference"),
    Mutant("a diverged run is forgotten", "results/selection.py", 'if status["state"] == "diverged"',
           'if status["state"] == "failed"', "test_claims.py::test_a_diverged_run_fails_the_claims_that_need_it"),
    Mutant("the better side of a conjunction", "results/criteria.py", "return max((v for v, _ in results)",
           "return min((v for v, _ in results)", "test_claims.py::test_verdicts"),
    Mutant("too few seeds are enough", "results/criteria.py", "min(value.n, low.n, high.n)) < self.n_min",
           "min(value.n, low.n, high.n)) < 1", "test_claims.py::test_not_tested_says_why"),
    Mutant("failed by two sds and partly", "results/criteria.py", '"partly" if excess.mean < excess.sd',
           '"partly" if excess.mean < 3 * excess.sd', "test_claims.py::test_verdicts"),
    Mutant("checksum of a record skipped", "results/records.py", 'if hashlib.sha256(path.read_bytes()).hexdigest() !=',
           'if "" and hashlib.sha256(path.read_bytes()).hexdigest() !=', "test_records.py::test_a_table_that_was_edited_is_refused"),
    Mutant("numbers of a record rounded", "results/records.py", 'float_format="%.8g"', 'float_format="%.4g"',
           "test_records.py::test_a_table_comes_back_as_it_was_written"),
    Mutant("checksum of a checkpoint skipped", "results/store.py", ".hexdigest().encode() != digest",
           ".hexdigest().encode() == b''", "test_train.py::test_a_damaged_checkpoint_raises"),
    Mutant("a checkpoint may run code", "results/store.py", 'io.BytesIO(payload), map_location="cpu", weights_only=True',
           'io.BytesIO(payload), map_location="cpu", weights_only=False',
           "test_damage.py::test_a_hostile_checkpoint_runs_nothing"),
    Mutant("no checkpoint before the latest one", "results/store.py", "payload, keep=CHECKPOINTS[1])", "payload)",
           "test_damage.py::test_the_checkpoint_before_a_damaged_one_is_used"),
    Mutant("checksum of a run's table skipped", "results/store.py", "and digest:", "and False:",
           "test_damage.py::test_a_table_of_a_run_has_a_checksum"),
    Mutant("every error of a lock means busy", "results/store.py", "if isinstance(error, BlockingIOError) and not wait:", "if not wait:",
           "test_input.py::test_A09_a_file_system_without_locks_is_a_sentence"),
    Mutant("a fingerprint for a run of a record", "results/registered.py", "for c in kept if isinstance(c, Config)}",
           "for c in kept if c.run in known}",
           "test_records.py::test_collecting_makes_no_fingerprint_of_a_run_that_a_record_holds"),
    Mutant("a run of another machine counts as the record's", "results/records.py",
           'or any(m not in about["environments"] for m in machines)', "or False",
           "test_campaign.py::test_a_figure_that_is_trained_again_takes_the_place_of_its_record"),
    Mutant("two trainings are mixed in a record", "results/records.py",
           "bool(mine) and all(c.run in own for c in held)", "bool(mine)",
           "test_campaign.py::test_a_figure_that_is_trained_again_takes_the_place_of_its_record"),
    Mutant("other settings go into a record", "results/records.py", "return planned if {c.run for c in configs} <=",
           "return planned if {c.run for c in configs} &",
           "test_campaign.py::test_a_record_holds_the_figures_own_runs_and_loses_none"),
    Mutant("criteria may change after the runs", "results/registered.py", '("target", "tolerance", "criterion", "n_min")',
           '("target", "tolerance", "n_min")', "test_records.py::test_a_claim_that_is_changed_after_its_runs_is_noticed"),
    Mutant("a file is not put in its place at once", "paths.py", "open(temporary, \"wb\")", 'open(path, "wb")',
           "test_train.py::test_a_file_is_written_whole_or_not_at_all"),
    Mutant("a weight that is spoilt by the last step", "train/loop.py",
           "all(map(math.isfinite, losses)) and all_finite(net.parameters())", "all(map(math.isfinite, losses))",
           "test_train.py::test_a_run_whose_last_step_spoils_a_weight_diverged"),
    Mutant("error bars of the standard error", "plot.py", "sd = values.std() if", "sd = values.sem() if",
           "test_plot.py::test_an_error_bar_at_the_last_epoch_is_one_sample_sd"),
    Mutant("a finished run is replaced by one that comes back", "results/store.py",
           'if self.finished:\n                return ""', "pass",
           "test_cluster.py::test_files_travel_and_a_finished_run_is_never_replaced"),
    Mutant("a run that another process holds is replaced", "results/store.py", "if not mine:", "if False:",
           "test_cluster.py::test_a_table_that_arrives_while_another_process_holds_the_run_is_not_counted"),
    Mutant("a later checkpoint is replaced", "results/store.py", "elif _reached(files) <= _reached(", "elif -2 >= len(",
           "test_cluster.py::test_the_checkpoint_of_more_epochs_stays"),
    Mutant("a damaged table is installed", "results/store.py", "if not whole(files):", "if False:",
           "test_cluster.py::test_a_status_without_its_table_is_not_installed_and_the_worker_trains_again"),
    Mutant("a forked process keeps the lock", "results/store.py", "_held.pop().close()", "_held.clear()",
           "test_damage.py::test_a_forked_process_does_not_keep_the_lock"),
    Mutant("a cancelled job is none", "results/executors.py", "if future.cancelled():", "if False:",
           "test_kill.py::test_jobs_that_their_scheduler_cancels_end_in_a_sentence"),
    Mutant("a job is lost with its worker", "results/executors.py", "if attempt < attempts:", "if False:",
           "test_kill.py::test_a_job_is_taken_up_by_another_worker"),
    # --------------------------------------------------------------------------------------------- the pages of paper 2
    Mutant("rate of a mode without its null term", "experiments/_estimation.py", "c[\"null\"] * mu[:, None]",
           "0 * mu[:, None]", "test_estimation.py::test_the_end_solves_the_linear_system_and_its_rates_are_the_systems"),
    Mutant("drive of the fixed point without amp", "experiments/_estimation.py", "c[\"amp\"] * W @ S +", "0 * W @ S +",
           "test_estimation.py::test_the_end_solves_the_linear_system_and_its_rates_are_the_systems"),
    Mutant("W and B not exchanged where W learns", "experiments/_estimation.py", "return down(B, W) if forward",
           "return down(W, B) if forward", "test_estimation.py::test_both_sides_descend_the_objective_under_white_input"),
    Mutant("resting point of a pair without its factor 2", "experiments/_dynamics.py", "(2 * rule.null * power)",
           "(rule.null * power)", "test_estimation.py::test_rates_of_a_pair_are_the_jacobians"),
    Mutant("rate of the difference at IA's point", "experiments/_dynamics.py", "return -2 * excess, -4 * rule.decay",
           "return -2 * excess, -2 * rule.decay", "test_estimation.py::test_rates_of_a_pair_are_the_jacobians"),
    Mutant("sign of an eigenvalue", "experiments/_dynamics.py", "found.append(Mode(point, direction, -extreme.item()))",
           "found.append(Mode(point, direction, extreme.item()))",
           "test_estimation.py::test_eigenvalues_of_a_layer_under_white_input_are_the_pairs"),
    Mutant("response without the step", "experiments/_following.py", "/ (z - 1 + rates)", "/ (z + rates)",
           "test_estimation.py::test_the_response_to_a_turning_weight_is_that_of_the_recursion"),
    Mutant("activity not held where x changes", "experiments/_framework.py",
           "W=moved(W, (every, 1, -W[:, 0] * by / x[0, 1]))", "W=W",
           "test_estimation.py::test_an_intervention_moves_one_quantity_and_no_other"),
    Mutant("a run that diverged counts nothing", "experiments/_short.py", "return CHANCE,", "return 0.0,",
           "test_tuning.py::test_training_that_diverges_counts_as_chance_and_is_marked"),
    Mutant("near the best is better than two points below", "experiments/_search.py", "score >= score.max() - NEAR",
           "score > score.max() - NEAR", "test_tuning.py::test_the_share_of_a_grid_near_its_best"),
    Mutant("a grid that is not centred", "experiments/p2_tuning.py", "(self.side - 1) / 2", "self.side / 2",
           "test_tuning.py::test_the_middle_of_a_grid_and_its_corners"),
    Mutant("a needed run's weights in place of its table", "results/runs.py", 'getattr(f.config, "keep", False)',
           "True", "test_tuning.py::test_a_summary_reads_the_tables_of_its_runs"),
    # ------------------------------------------------------------------------------------------------------------ plans
    Mutant("a record of two machines used", "results/costs.py", "if fits and len(machines) > 1:",
           "if fits and len(machines) > 2:", "test_plan.py::test_a_record_of_several_machines_is_named_and_not_used"),
    Mutant("epoch 0 is not measured", "train/timing.py", "for e in range(epochs + 1) for m", "for e in range(1, epochs + 1) for m",
           "test_plan.py::test_a_whole_run_is_counted_as_the_trainer_makes_it"),
    Mutant("runs wait for the last device", "results/plan.py", "free[free.index(min(free))]", "free[free.index(max(free))]",
           "test_plan.py::test_a_free_device_begins_the_next_run"),
]  # fmt: skip


class Failures:
    """A plugin of pytest that keeps the ids of failed tests, below tests/ and without the names of their cases."""

    def __init__(self) -> None:
        self.ids: set[str] = set()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest after each phase of a test."""
        if report.failed:
            name = report.nodeid.removeprefix("tests/")
            self.ids |= {name, name.partition("[")[0]}


def run(mutant: Mutant | None, tests: Sequence[str]) -> tuple[bool, list[str]]:
    """Run tests in a copy with one mutant, or with none; in a process of its own, which has not imported the package.

    Returns:
        Whether pytest could run all the tests, and those of them that did not fail.
    """
    with TemporaryDirectory(prefix="fa-mutant-") as folder:
        copy, failures = Path(folder).resolve(), Failures()
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant:
            path = copy / "fa" / mutant.file
            path.write_text(path.read_text().replace(mutant.text, mutant.wrong))
        os.chdir(copy)
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[:] = [str(copy), *(p for p in sys.path if p != str(ROOT / "tests"))]
        with redirect_stdout(StringIO()) as said:
            ended = pytest.main(["-q", "-o", "addopts=", *(f"tests/{test}" for test in tests)], [failures])
        if ended not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            sys.stderr.write(said.getvalue())
            return False, list(tests)
        return True, [test for test in tests if test not in failures.ids]


def main(names: Sequence[str]) -> int:
    """Run the named mutants, or all, and print what became of each. Returns the exit status: 1 if any is not caught."""
    known = {mutant.name: mutant for mutant in MUTANTS}
    if unknown := [name for name in names if name not in known]:
        sys.stderr.write(f"no mutant is called {unknown[0]!r}; known: {', '.join(known)}\n")
        return 2
    chosen = [known[name] for name in names] or MUTANTS
    once = [m for m in chosen if (ROOT / "fa" / m.file).read_text().count(m.text) == 1]
    tests = list(dict.fromkeys(test for m in once for test in m.tests.split()))
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ.setdefault("FA_DATA", str(ROOT / "data"))
    context = get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    caught = 0
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as processes:
        halves = [half for half in (tests[::2], tests[1::2]) if half]
        for half, (ran, passed) in zip(halves, processes.map(run, [None] * len(halves), halves)):
            if not ran or len(passed) < len(half):
                print(f"without a mutant these tests fail: {', '.join(t for t in half if not ran or t not in passed)}")
                return 1
        fates = processes.map(run, once, [m.tests.split() for m in once])
        for m in chosen:
            ran, passed = next(fates) if m in once else (False, [])
            caught += ran and not passed
            fate = "text not found" if m not in once else "NOT RUN" if not ran else "NOT CAUGHT" if passed else "caught"
            print(f"{fate:<15} {m.name}" + (f": {', '.join(passed)}" if passed else ""), flush=True)
    print(f"{caught} of {len(chosen)} mutants are caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
