"""Bugs put into a copy of the library, one at a time: each must be noticed by the tests named.

    python tools/mutants.py             # all of them
    python tools/mutants.py sigma mask  # those whose name contains a word

Every mutant runs in a forked child of one process that has imported torch and transformers, so that
it costs its tests and no start-up. Exit status 1 if one survives or does not apply."""
import contextlib, importlib, os, shutil, sys, tempfile, time, traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARENT_IMPORTS = ("torch", "transformers", "datasets", "peft", "accelerate", "hypothesis", "pytest",
                  "torch._dynamo", "transformers.trainer")


class Mutant(NamedTuple):
    name: str # what is wrong
    module: str # of vcb_nb
    old: str # source text that occurs exactly once
    new: str # what stands there in the mutant
    tests: str # words for pytest: files, and -k with an expression without spaces around it
    pitfall: int = 0 # of nbs/pitfalls.qmd


MUTANTS = [Mutant(*row) for row in [
    ("σ over the batch", "losses",
     "sigma = (_centred(values, mask).square().sum(1) / degrees).sqrt()",
     "sigma = (_centred(values, mask).square().sum() / degrees.sum()).sqrt().expand(len(degrees))",
     "test_losses.py -k ragged_equals", 23),
    ("a float residue is a signal", "losses",
     "signal = sigma > reward_resolution(rewards, mask)\n    return",
     "signal = sigma > 0\n    return", "test_losses.py -k identity_9", 22),
    ("an absolute floor for σ", "losses",
     "spread = REWARD_RESOLUTION * _centred(values, mask).abs().amax(1)",
     "spread = REWARD_RESOLUTION + 0 * values.abs().amax(1)", "test_losses.py -k small_but_real",
     22),
    ("σ with ddof 0", "losses", "degrees = (mask.sum(1) - ddof).clamp(min=1)",
     "degrees = mask.sum(1).clamp(min=1)", "test_losses.py -k identity_3", 0),
    ("near ties are ordered", "losses",
     "_pair_mask(mask) & (gaps.abs() > reward_resolution(rewards, mask)[:, None])",
     "_pair_mask(mask)",
     "test_losses.py -k ties", 22),
    ("an infinite reward passes", "losses", "bad = mask & ~values.isfinite()",
     "bad = mask & values.isnan()", "test_losses.py -k bad_reward", 25),
    ("masked before the non-linearity", "losses",
     "return x.masked_fill(~mask, 0.).sum(1) / mask.sum(1).clamp(min=1)",
     "return x.sum(1) / mask.sum(1).clamp(min=1)", "test_losses.py -k masked_candidates", 8),
    ("an absent candidate's NaN", "losses", "logps = logps.to(dtype).masked_fill(~mask, 0.)",
     "logps = logps.to(dtype)", "test_losses.py -k masked_candidates", 8),
    ("pairs with an absent candidate", "losses", "return mask[:, i] & mask[:, j]",
     "return mask[:, i]", "test_losses.py -k ragged_equals", 8),
    ("bf16 arithmetic", "losses", "dtype = torch.promote_types(logps.dtype, torch.float32)",
     "dtype = logps.dtype", "test_losses.py -k low_precision", 5),
    ("the reference is ignored", "losses", "return logps, logps - ref_logps.detach()",
     "return logps, logps - 0 * ref_logps.detach()", "test_losses.py -k brute", 9),
    ("a gradient into the reference", "losses", "logps - ref_logps.detach().to(logps)",
     "logps - ref_logps.to(logps)", "test_losses.py -k get_no_gradient", 0),
    ("half of VCB", "losses", "_with_signal(2 * _variance(residual, mask), signal)",
     "_with_signal(_variance(residual, mask), signal)", "test_losses.py -k identity_3", 7),
    ("γ on the reward's side", "losses",
     "residual = gamma * ratios - _scaled_rewards(rewards, mask, sigma, ratios)",
     "residual = ratios - gamma * _scaled_rewards(rewards, mask, sigma, ratios)",
     "test_losses.py -k identity_5", 0),
    ("σ is not used", "losses", "return (centred / torch.where(sigma > 0, sigma, 1.)[:, None])",
     "return (centred)", "test_losses.py -k identity_1", 0),
    ("LogSumExp without its 1/λ", "losses", "torch.expm1(lam * (x - top)), mask)) / lam",
     "torch.expm1(lam * (x - top)), mask))", "test_losses.py -k lse", 0),
    ("an absent pair's infinity", "losses", '    x = x.masked_fill(~mask, 0.)\n', "",
     "test_losses.py -k absent_candidates_far", 8),
    ("n = 2 without a warning", "losses", "(mask.sum(1) == 2).any()", "(mask.sum(1) == 1).any()",
     "test_losses.py -k two_candidates", 24),
    ("DPO without the order", "losses", "margins = beta * order * _pair_differences(ratios)",
     "margins = beta * _pair_differences(ratios)", "test_losses.py -k brute", 0),
    ("IPO's target doubled", "losses", "_pair_differences(ratios) - 1 / (2 * tau)",
     "_pair_differences(ratios) - 1 / tau", "test_losses.py -k brute", 0),
    ("SLiC's regulariser upside down", "losses", "- lam_reg * _best_logp",
     "+ lam_reg * _best_logp", "test_losses.py -k brute", 0),
    ("RRHF's score is a sum", "losses",
     'per_token = logps / _checked_lengths(lengths, mask, "RRHF")',
     'per_token = logps + 0 * _checked_lengths(lengths, mask, "RRHF")',
     "test_losses.py -k by_hand", 4),
    ("RRHF's likelihood per token", "losses", "loss = rank_weight * wrong - _best_logp(logps,",
     "loss = rank_weight * wrong - _best_logp(per_token,", "test_losses.py -k rrhf_sft", 19),
    ("absent candidates in a softmax", "losses", "lowest = torch.finfo(ratios.dtype).min",
     "lowest = 0.", "test_losses.py -k ragged_equals", 8),
    ("another method's function", "losses", 'Loss("rpo_bwd", rpo_bwd_loss',
     'Loss("rpo_bwd", rpo_sq_loss', "test_losses.py -k differs", 17),
    ("hyper-parameters are dropped", "losses",
     "return fn(logps, ref_logps, rewards, **data, **params)",
     "return fn(logps, ref_logps, rewards, **data)", "test_losses.py -k reach_the_loss", 17),
    ("the mask from the padding id", "batches",
     "return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()",
     "return ids, (ids != pad_id).long()", "test_sft.py -k labels", 2),
    ("dropout in the attention stays", "models",
     'if "drop" in name and isinstance(value, float): setattr(module, name, 0.)', "pass",
     "test_models.py -k dropout_is_off", 7),
    ("no gradient at the embeddings", "adapters", '    model.enable_input_require_grads()\n', "",
     "test_adapters.py -k without_input_gradients", 13),
    ("a reward model pads with EOS", "tokenizers",
     "pad_id = _distinct_pad_id(model, tokenizer, preferred)", "pad_id = preferred or 0",
     "test_loading.py -k foreign_reward", 20),
    ("the id after the vocabulary's last passes", "batches",
     "max(ids) < size: continue", "max(ids) <= size: continue",
     "test_logprobs.py -k unknown_token", 0),
    ("the id after the vocabulary's last passes in a batch", "batches",
     "if not 0 <= x < size), None)", "if not 0 <= x <= size), None)",
     "test_logprobs.py -k unknown_token", 0),
    ("ids come in unchecked", "batches",
     '    check_vocabulary(model, prompt_ids, completion_ids, name)\n', "",
     "test_logprobs.py -k unknown_token", 0),
    ("a batch laid out by hand is trusted", "logprobs",
     '    check_batch_ids(model, batch.input_ids, *targets)\n', "",
     "test_logprobs.py -k unknown_token", 0),
    ("a live reference is trusted with the policy's ids", "calibrate",
     "for reader in filter(None, (model, reference)):", "for reader in (model,):",
     "test_calibrate.py -k live_reference_with_fewer", 0),
    ("dropout on while scoring", "batches", '    model.eval()\n', "",
     "test_sample.py -k dropout_is_off", 7),
    ("pickled weights alone are no reason", "loading", '    if any(folder.glob(weights)): return\n',
     '    return\n', "test_loading.py test_security.py -k pickle", 0),
    ("labels on the prompt", "sft", 'torch.tensor([max(1, row["prompt_length"]) for row in rows])',
     "torch.tensor([1 for row in rows])", "test_sft.py -k labels", 15),
    ("labels masked by the padding id", "sft", "silent = (mask == 0) |",
     "silent = (ids == pad_id) |", "test_sft.py -k labels", 2),
    ("an empty completion stays", "data", "kept = [i for i, (ids, _) in enumerate(coded) if ids]",
     "kept = list(range(n))", "test_data.py -k emptied", 28),
    ("a second BOS", "data", "if bos and ids[:1] == bos: ids = ids[1:]", "if False: ids = ids[1:]",
     "test_data.py -k one_bos", 29),
    ("stored ids are made anew", "data", 'if "completion_ids" in row:',
     'if "completion_id" in row:', "test_data.py -k never_made_anew", 27),
    ("a cut text gets an EOS", "data", 
     "> max_length\n    return (ids[:max_length], False) if cut else (ids, finished)\n\ndef "
     "encode_completion(",
     "> max_length\n    return (ids[:max_length - 1] + [eos], True) if cut else (ids, finished)\n\n"
     "def encode_completion(",
     "test_data.py test_sft.py -k cut_and_blank or eos", 21),
    ("a streamed part starts at 0", "data", "stream = stream.skip(part.start or 0)",
     "stream = stream.skip(0)", "test_hub.py -k test_parts", 0),
    ("a part of files is the whole", "data", "return islice(rows, part.start, part.stop)",
     "return rows", "test_hub.py -k no_further", 0),
    ("every prompt draws alike", "sample", "PCG64([seed, row, j])", "PCG64([seed, j])",
     "test_sample.py -k distinct", 26),
    ("every sample draws alike", "sample", "PCG64([seed, row, j])", "PCG64([seed, row])",
     "test_sample.py -k distinct", 26),
    ("positions count the padding", "sample", "positions = (mask.cumsum(-1) - 1).clamp(min=0)",
     "positions = (torch.ones_like(mask).cumsum(-1) - 1)", "test_sample.py -k greedy_equals", 3),
    ("the nucleus lacks its last token", "sample", "before = probs.cumsum(-1) - probs",
     "before = probs.cumsum(-1)", "test_sample.py -k match_the_definition", 0),
    ("a token of probability 0", "sample", "right=True", "right=False",
     "test_sample.py -k probability_zero", 0),
    ("padding is sampled", "sample",
     "allowed = _without(logits, self.banned)", "allowed = logits",
     "test_sample.py", 0),
    ("every sample is finished", "sample", '"stop" if c[-1] in ends else "length"', '"stop"',
     "test_sample.py -k ends_are_kept", 21),
    ("ids made again from the text", "sample", "**dict(zip(Samples._fields, values))}",
     "**dict(zip(Samples._fields, values)), 'completion_ids': [tokenizer.encode(t) for t "
     "in decode_texts(tokenizer, values[0])]}", "test_sample.py -k would_drift", 27),
    ("the samples' key lacks the temperature", "sample", "the distribution; 0 is greedy.\")",
     "the distribution; 0 is greedy.\", decides=False)", "test_sample.py -k other_settings", 11),
    ("the samples' key is a path", "settings", "contents = {name: source_key(values[name])",
     "contents = {name: str(values[name])", "test_sample.py -k other_weights", 11),
    ("a cut text is scored with EOS", "judges",
     'encode_response(tokenizer, row, text, reason == "stop",',
     "encode_response(tokenizer, row, text, True,", "test_score.py -k another_tokenizer", 21),
    ("a reward that is not finite", "judges",
     "isinstance(plain, (numbers.Real, Decimal)) and math.isfinite(plain)",
     "isinstance(plain, (numbers.Real, Decimal))",
     "test_score.py -k bad_reward", 25),
    ("the scores' key lacks the function", "settings",
     "return fingerprint([name, *sorted(files)])", "return name",
     "test_score.py -k changed_reward_function", 11),
    ("an accumulated pair loss", "reward", "loss.sum() / num_items_in_batch", "loss.mean()",
     "test_reward.py -k accumulation", 14),
    ("no EOS behind the rejected side", "reward",
     'encode_response(tokenizer, row, row["rejected"], True, room)',
     'encode_response(tokenizer, row, row["rejected"], False, room)',
     "test_reward.py -k ending_says", 21),
    ("chosen and rejected interleaved", "reward", "logits.float().view(2, -1).T",
     "logits.float().view(-1, 2)", "test_reward.py -k last_token", 0),
    ("every process makes every part", "shards", "return range(rank, total, world)",
     "return range(total)", "test_shards.py -k exactly_one", 26),
    ("a folder of other settings is gone on with", "settings",
     "if changed := differences(type(config), before, now):",
     "if changed := None:", "test_shards.py -k keeps_to_its_settings", 11),
    ("missing parts are not missed", "shards", "if complete and found and len(found) < totals[0]:",
     "if False:", "test_shards.py -k not_made_again", 0),
    ("parts of two divisions", "shards", "if len(totals) > 1:", "if len(totals) > 2:",
     "test_shards.py -k mixture", 0),
    ("inputs are known by their path", "settings", "if whole.exists(): return _content(whole)",
     "if whole.exists(): return str(whole)", "test_pipeline.py -k changed_input", 11),
    ("a setting that counts is cosmetic", "prepare", 'option(512, "Number of tokens.")',
     'option(512, "Number of tokens.", decides=False)', "test_pipeline.py -k changed_recipe", 11),
    ("a plan stops at what is stale", "pipeline", 'if cause and states[job.name][0] != "new":',
     "if False:", "test_pipeline.py -k follows_what_is_stale", 0),
    ("a report of a stage that was made again is stale", "settings",
     '    if path.name == MANIFEST: return read_json(path)["key"]\n', "",
     "test_stages.py -k one_entry", 0),
    ("--redo=false is yes", "cli", "type=truth, default=False", "type=bool, default=False",
     "test_cli.py -k redo_is_what", 0),
    ("a device is a reason to sample again", "sample",
     "\"'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.\", decides=False)",
     "\"'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.\")",
     "test_settings.py -k every_setting_of_ours", 0),
    ("a harmed file is not noticed", "pipeline",
     '    changed = changed_outputs(job.folder, found)\n', '    changed = []\n',
     "test_pipeline.py -k harmed", 0),
    ("foreign files are overwritten", "pipeline",
     '("new", "") if not list_outputs(job.folder) else', '("new", "") if True else',
     "test_pipeline.py -k unknown_files", 0),
    ("checkpoints sorted by name", "training",
     'return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))', "return sorted(found)",
     "test_training.py -k half_written", 0),
    ("a checkpoint without its optimizer", "training",
     'rest = [checkpoint/"optimizer.pt", checkpoint/"scheduler.pt"]',
     'rest = [checkpoint/"scheduler.pt"]', "test_training.py -k half_written", 0),
    ("half the weights are whole", "training",
     "    except (OSError, SafetensorError): return False",
     "    except (OSError, SafetensorError): return True", "test_training.py -k half_written", 0),
    ("resumed at another learning rate", "settings", "output_dir run_name project",
     "output_dir learning_rate run_name project", "test_training.py -k other_settings", 11),
    ("prompts on both sides of the split", "training",
     "keys = list(map(prompt_key, dataset[group])) if group",
     "keys = list(range(len(dataset))) if group", "test_training.py -k keeps_prompts", 0),
    ("the Trainer drops columns", "training", "remove_unused_columns: bool = option(False,",
     "remove_unused_columns: bool = option(True,", "test_training.py -k defaults", 15),
    ("a NaN loss trains on", "training", 'if not math.isfinite((logs or {}).get("loss", 0.)):',
     "if False:", "test_training.py -k not_finite", 0),
    ("a response is markup", "report", "html.escape(str(c))", "str(c)",
     "test_report.py test_security.py -k model_text or hostile", 0),
    ("trust outlives its command", "loading", '    finally: _trusting.reset(token)\n',
     '    finally: pass\n', "test_security.py -k ends_with_its_command", 0),
    ("a name leads out of the run", "stages", "and name.isprintable(): return", "or True: return",
     "test_security.py -k writes_elsewhere", 0),
    ("a recipe climbs out of its folder", "recipes", '    _refuse_climbing(recipe, path.name)\n',
     "", "test_security.py -k writes_elsewhere", 0),
    ("a stage writes where it likes", "recipes", 'if "output_dir" in settings:', "if False:",
     "test_security.py -k writes_elsewhere", 0),
    ("an override wipes its section", "recipes", "if recipe.get(part) is None: recipe[part] = {}",
     "recipe[part] = {}", "test_properties.py -k its_key_alone", 0),
    ("a whole number becomes a fraction", "settings", "return int(number) if number",
     "return number if number", "test_properties.py test_settings.py -k survives or coerce", 0),
    ("a value-based loss of absolute values", "losses",
     "2 * _variance(beta * ratios - eta * r, mask)",
     "2 * _masked_mean((beta * ratios - eta * r).square(), mask)",
     "test_properties.py -k log_ratios_changes or sum_to_zero", 0),
    ("a recipe trusts model code", "recipes", '    _refuse_remote_code(recipe, where)\n', "",
     "test_security.py -k trusts_model_code", 0),
    ("a mean over the padded length", "logprobs",
     "values = values / batch.completion_lengths[:, None]",
     "values = values / batch.input_ids.shape[1]", "test_logprobs.py -k by_hand", 4),
    ("log-softmax in bf16", "packing", 'logits = logits.float()\n    logps = -F',
     'logits = logits\n    logps = -F', "test_logprobs.py -k fp32", 5),
    ("predicted one place too early", "logprobs", "logits[rows, at - 1 - first]",
     "logits[rows, (at - 2 - first).clamp(min=0)]", "test_logprobs.py -k equals_the_oracle", 0),
    ("the EOS is masked out", "logprobs", "token_mask = steps < batch.completion_lengths[:, None]",
     "token_mask = steps < (batch.completion_lengths[:, None] - 1).clamp(min=1)",
     "test_logprobs.py -k eos", 2),
    ("positions run on", "packing", "positions += range(len(prompt), len(prompt) + last + whole)",
     "positions += range(len(positions), len(positions) + last + whole)",
     "test_packing.py -k those_of_rows and gpt_neox", 6),
    ("a response sees its own future", "packing", "dtype=torch.bool).tril(p)", "dtype=torch.bool)",
     "test_packing.py -k those_of_rows and gpt_neox", 6),
    ("the last token in the row predicts the first", "packing",
     "predict += [start + len(prompt) - 1,", "predict += [start + len(ids) - 1,",
     "test_packing.py -k those_of_rows and gpt_neox", 6),
    ("responses attend to the prompt's keys only", "packing",
     "joined = [torch.cat(pair, 2) for pair in pairs]",
     "joined = [torch.cat([x, x[:, :, :1].expand_as(y)], 2) for x, y in pairs]",
     "test_packing.py -k those_of_rows and gpt_neox", 6),
    ("values are joined again as keys", "packing", "for x, pair in zip(joined, pairs)}",
     "for x, pair in zip(joined, pairs[::-1])}", "test_packing.py -k those_of_rows and gpt_neox",
     6),
    ("the packed head in bf16", "packing",
     "return logits if logits.dtype == torch.float64 else logits.float()", "return logits",
     "test_packing.py -k precision or autocast", 5),
    ("a frozen head forgets the gradient above it", "packing",
     "if ctx.frozen: return (pull * grad)", "if ctx.frozen: return (pull)",
     "test_packing.py -k test_lora and gpt_neox", 0),
    ("every kept block has the last one's maxima", "packing",
     "return masses.to(hidden.dtype), (top - norm).exp()",
     "return masses.to(hidden.dtype), torch.ones_like(norm)",
     "test_packing.py test_properties.py -k head or packed", 0),
    ("a target is among the others", "packing", "masses[block.tokens, block.places] = 0", "pass",
     "test_packing.py test_properties.py -k head or packed", 0),
    ("earlier blocks keep their old maxima", "packing", "self.total * fade + masses.sum",
     "self.total + masses.sum", "test_packing.py test_properties.py -k head or packed", 0),
    ("a block's targets are those of other tokens", "packing",
     "zip(starts, targets.argsort()", "zip(starts, torch.arange(len(targets))",
     "test_packing.py test_properties.py -k head or packed", 0),
    ("kept blocks lie in one another's memory", "packing",
     "if self.keep: self.free = self.free[size:]", "pass",
     "test_properties.py -k packed_is_rows", 0),
    ("the head's gradient is written over the block it is made of", "packing",
     "self.free = piece[lead:]", "self.free = piece",
     "test_properties.py -k packed_is_rows", 0),
    ("the head's gradient overtakes the blocks of a few tokens", "packing",
     "self.rows = max(self.rows, weight.shape[1])", "pass",
     "test_properties.py -k packed_is_rows", 0),
    ("a second backward writes over the first one's gradient", "packing",
     "to_weight, ctx.gradient = ctx.gradient, None", "to_weight = ctx.gradient",
     "test_packing.py -k second_backward", 0),
    ("a packed reward at the last token but one", "packing", "hidden[last_places(packing)]",
     "hidden[last_places(packing) - 1]", "test_packing.py -k rewards_are_those and gpt_neox", 20),
    ("a long prompt's last piece is lost", "packing", '        if piece[1]: yield piece\n',
     '        if piece[1] == list(range(len(completions))): yield piece\n',
     "test_packing.py -k batches", 0),
    ("shared dropout is packed", "packing",
     "if model.training and any(map(_drops, model.modules())):", "if False:",
     "test_packing.py -k dropout", 7),
    ("a sliding window is packed", "packing", "if window and length > window:", "if False:",
     "test_packing.py -k window", 6),
    ("an accumulated loss", "calibrate",
     "count = weight.sum() if count is None else count / self.accelerator.num_processes",
     "count = weight.sum()", "test_calibrate.py -k accumulation", 14),
    ("repeated rows count", "training", "if state.end_of_dataloader and state.remainder > 0:",
     "if False:", "test_calibrate.py -k two_processes", 16),
    ("the stored reference is ignored", "calibrate", 'ref = inputs["ref_logps"] if stored else',
     'ref = inputs["ref_logps"] * 0 if stored else', "test_calibrate.py -k perturbed or step_zero",
     9),
    ("rewards of other candidates", "calibrate",
     'return [[row[name][j] for j in row["picked"]] for row in rows]',
     'return [row[name][:len(row["picked"])] for row in rows]',
     "test_calibrate.py -k picked_candidates", 28),
    ("σ is lost on its way", "calibrate",
     'torch.tensor([row["sigma"] for row in rows], dtype=torch.float32)', "torch.ones(len(rows))",
     "test_calibrate.py -k subsampling or step_zero", 0),
    ("the base in place of the SFT model", "adapters",
     "model = model.merge_and_unload(safe_merge=True)",
     "model = model.unload()", "test_calibrate.py -k on_top_of", 12),
    ("a trained adapter, switched off, as reference", "calibrate", 'if "lora_B" in name):',
     'if "lora_Z" in name):', "test_calibrate.py -k trained_adapter", 10),
    ("the policy is its own reference", "calibrate",
     "reference = copy_model(model) if reference is None",
     "reference = model if reference is None", "test_calibrate.py -k stays_frozen", 10),
    ("a late evaluation without a reference", "calibrate",
     '("rewards", "ref_logps")[:1 + (reference == "stored")]', '("rewards",)',
     "test_calibrate.py -k late_evaluation or missing_column", 10),
    ("evaluation with a σ of its own", "calibrate",
     'pooled = self.info.get("train", {}).get("pooled_sigma")', "pooled = None",
     "test_calibrate.py -k pooled_sigma", 0),
    ("an empty completion is picked", "calibrate",
     "[j for j, ids in enumerate(candidates) if len(ids)]", "list(range(len(candidates)))",
     "test_calibrate.py -k empty_completion", 28),
    ("KL off policy", "evaluate",
     "return self.temperature == 1 and self.top_p >= 1 and not self.top_k", "return True",
     "test_evaluate.py -k off_policy", 30),
    ("k3 with its sign turned", "measures", "(np.expm1(np.minimum(-r, 80.)) + r)",
     "(np.expm1(np.minimum(r, 80.)) - r)", "test_measures.py -k exact_kl", 30),
    ("pairs are drawn in place of prompts", "measures",
     "ids = np.arange(len(values)) if groups is None else",
     "ids = np.arange(len(values)) if True else",
     "test_measures.py -k shared_prompts", 0),
    ("a pooled σ without weights", "measures",
     "(freedom * sigma.double()**2).sum().item() / max(freedom.sum().item(), 1)",
     "(sigma.double()**2).mean().item()", "test_measures.py -k prompts_own", 24),
    ("samples of one random number meet", "measures", "if coupled and gaps.size > 1:", "if False:",
     "test_measures.py -k common_random", 0),
    ("a judge known by its name", "judges", "return fingerprint(source_key(source))[:12]",
     "return fingerprint(source)[:12]", "test_evaluate.py -k changed_judge", 11),
    ("the budget repeats the prompt", "budget",
     "tokens, pairs = p + n * own, p * (p + 1) / 2 + n * (own * p + own * (own + 1) / 2)",
     "tokens, pairs = n * (p + own), p * (p + 1) / 2 + n * (own * p + own * (own + 1) / 2)",
     "test_budget.py -k operations"),
    ("frozen weights are trained in the budget", "budget",
     "own = shape.trained_trunk / shape.trunk", "own = 1", "test_budget.py -k operations"),
    ("the budget forgets the head's gradient", "budget",
     "answers, gradient = work.batch * work.n * work.longest[1], 4. * shape.trained_head",
     "answers, gradient = work.batch * work.n * work.longest[1], 0.",
     "test_budget.py -k asks_for"),
    ("checkpointing keeps everything in the budget", "budget",
     "layer = size * shape.hidden if work.checkpointing else kept", "layer = kept",
     "test_budget.py -k asks_for"),
    ("the cache holds a prompt for each sample", "budget",
     "cache = work.batch * (prompt + work.n * response)",
     "cache = work.batch * work.n * (prompt + response)", "test_budget.py -k cache"),
    ("a smaller batch makes smaller steps", "budget",
     "more = lambda size: work.accumulation * work.batch // size", "more = lambda size: 1",
     "test_budget.py -k smaller_batch"),
    ("the budget reads unprepared data", "budget",
     "if old in Path(str(source)).parents: return str(new/Path(source).relative_to(old))",
     "if old in Path(str(source)).parents: return str(source)", "test_budget.py -k foresees"),
    ("several devices work like one", "budget",
     "return peak * self.share * self.count", "return peak * self.share",
     "test_budget.py -k time"),
    ("a variant replaces its base's sections", "recipes",
     "return {**old, **{key: _merged(old.get(key), value) for key, value in new.items()}}",
     "return {**old, **new}", "test_recipes.py -k variant"),
    ("a variant writes into its base's folder", "recipes",
     'if k not in ("name", "output_dir")}', "if k}", "test_recipes.py -k variant"),
    ("a base leads back for ever", "recipes",
     "if base.resolve() in (path.resolve(), *above):", "if base.resolve() == path.resolve():",
     "test_recipes.py -k base_that"),]]


def source(mutant):
    return (ROOT/"vcb_nb"/f"{mutant.module}.py").read_text("utf-8")


def mutated(mutant):
    "The module's text with the bug in it."
    text = source(mutant)
    if text.count(mutant.old) != 1:
        raise ValueError(f"'{mutant.name}' does not apply: its text occurs "
                         f"{text.count(mutant.old)} times in vcb_nb/{mutant.module}.py.")
    return text.replace(mutant.old, mutant.new)


def copy_with(mutant, folder):
    "The package below `folder`, with the bug in it."
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT/"vcb_nb", folder/"vcb_nb", ignore=ignore)
    shutil.copytree(ROOT/"recipes", folder/"recipes", ignore=ignore)
    (folder/"vcb_nb"/f"{mutant.module}.py").write_text(mutated(mutant), "utf-8")


def arguments(mutant):
    "Words for pytest; what follows -k is one expression."
    files, _, expression = mutant.tests.partition(" -k ")
    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-W", "ignore",
             *(f"tests/{file}" for file in files.split())]
    return [*words, "-k", expression] if expression else words


def run_tests(mutant, folder):
    "In the child: forget our package, take the copy, run the tests. pytest's exit status."
    for name in [n for n in sys.modules if n.split(".")[0] == "vcb_nb"]: del sys.modules[name]
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = str(folder)
    os.chdir(ROOT)
    import hypothesis, pytest
    # A counterexample is enough here; the smallest one would take minutes.
    phases = hypothesis.Phase.explicit, hypothesis.Phase.generate
    hypothesis.settings.register_profile("mutants", phases=phases, database=None)
    hypothesis.settings.load_profile("mutants")
    found = importlib.import_module("vcb_nb").__file__
    if not found.startswith(str(folder)): raise RuntimeError(f"{found} is not the copy")
    return pytest.main(arguments(mutant))


def outcome(mutant):
    "'killed', 'survived', or what went wrong; and what pytest said."
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name)/"log"
        copy_with(mutant, folder)
        child = os.fork()
        if child == 0: _child(mutant, folder, log)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = log.read_text("utf-8")
    # pytest: 0 all passed, 1 some failed, 2 an import failed, 4 no such file, 5 no test chosen.
    state = {0: "survived", 1: "killed"}.get(status, f"error {status}")
    # A fixture or an import that breaks is no test that noticed.
    if state == "killed" and " failed" not in said.splitlines()[-1]: state = "error"
    return state, said


def _child(mutant, folder, log):
    "Run the tests with their output in a file, and leave without the parent's clean-up."
    status = 70
    try:
        with log.open("w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
            status = int(run_tests(mutant, folder))
    except BaseException: traceback.print_exc()
    finally:
        with contextlib.suppress(Exception): sys.stdout.flush()
        os._exit(status)


def main(words):
    chosen = [m for m in MUTANTS if not words or any(w in m.name for w in words)]
    for name in PARENT_IMPORTS: importlib.import_module(name)
    failed, start = [], time.time()
    for mutant in chosen:
        began = time.time()
        try: state, said = outcome(mutant)
        except ValueError as e: state, said = "does not apply", str(e)
        spent = f"{time.time() - began:5.1f} s"
        print(f"{state:<10} {spent}  {mutant.module}: {mutant.name}", flush=True)
        if state != "killed":
            failed.append(mutant)
            print("\n".join(said.splitlines()[-15:]))
    print(f"{len(chosen) - len(failed)} of {len(chosen)} mutants killed in "
          f"{time.time() - start:.0f} s")
    return int(bool(failed))


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
