/** `lc train config.yaml`: axolotl's names, strictly checked; every problem of a file comes in one error, with its line. */
import { readFileSync, statSync } from 'node:fs';
import { dirname, isAbsolute, resolve } from 'node:path';
import { LcError } from '@lc/tensor';
import { isMap, isScalar, isSeq, LineCounter, type Node, type ParsedNode, parse, parseDocument } from 'yaml';
import { z } from 'zod';
import { lrSchedulerTypes } from '../args.js';
import { suggest } from '../suggest.js';
import { parseBytes } from './exit.js';

const count = z.number().int().positive();
const fraction = z.number().min(0).lt(1);

/** A number of bytes, or text like 24GiB. */
const bytes = z.union([count, z.string()]).transform((value, context): number => {
  try {
    const number = typeof value === 'number' ? value : parseBytes('', value);
    if (number > 0) return number;
  } catch {}
  context.addIssue({ code: 'custom', message: `expected bytes like 24GiB or 512MiB, got ${JSON.stringify(value)}` });
  return z.NEVER;
});

const dataset = z.strictObject({
  /** A file or a folder of files, relative to the config file. */
  path: z.string().min(1),
  /** text: plain text; completion: JSONL with `text`; chat_template: JSONL with `messages`; default by file name and first line. */
  type: z.enum(['text', 'completion', 'chat_template']).optional(),
});

const ropeScaling = z.looseObject({
  rope_type: z.string().optional(),
  type: z.string().optional(),
  factor: z.number().positive().optional(),
});

const schema = z.strictObject({
  base_model: z.string().min(1),
  datasets: z.array(dataset).min(1),
  test_datasets: z.array(dataset).min(1).optional(),
  /** Tokens held out from the end of the packed data for evaluation: a share (< 1) or a number of sequences. */
  val_set_size: z.number().nonnegative().default(0),
  output_dir: z.string().min(1).default('./outputs/out'),

  sequence_len: count.default(2048),
  sample_packing: z.boolean().default(true),
  excess_length_strategy: z.enum(['raise', 'drop', 'truncate', 'split']).default('raise'),
  rope_scaling: ropeScaling.optional(),

  adapter: z.enum(['lora', 'qlora']).default('qlora'),
  load_in_4bit: z.boolean().optional(),
  lora_r: count.default(16),
  lora_alpha: z.number().positive().default(16),
  lora_dropout: fraction.default(0),
  lora_target_modules: z.union([z.array(z.string().min(1)).min(1), z.literal('all-linear')]).optional(),
  lora_target_linear: z.boolean().default(false),
  lora_target_parameters: z.array(z.string().min(1)).min(1).optional(),
  peft_use_rslora: z.boolean().default(false),

  micro_batch_size: count.default(1),
  gradient_accumulation_steps: count.default(1),
  num_epochs: z.number().positive().default(1),
  max_steps: count.optional(),
  learning_rate: z.number().positive().default(2e-4),
  lr_scheduler: z.enum(lrSchedulerTypes).default('cosine'),
  warmup_steps: z.number().int().nonnegative().optional(),
  warmup_ratio: fraction.default(0),
  optimizer: z.enum(['adamw_torch', 'adamw_8bit', 'adamw_bnb_8bit']).default('adamw_torch'),
  adam_beta1: fraction.default(0.9),
  adam_beta2: fraction.default(0.999),
  adam_epsilon: z.number().positive().default(1e-8),
  weight_decay: z.number().nonnegative().default(0),
  max_grad_norm: z.number().nonnegative().default(1),
  seed: z.number().int().nonnegative().max(0xffffffff).default(42),
  /** Not axolotl's: false trades the same bits every time for a faster attention backward on a GPU. */
  deterministic: z.boolean().default(true),

  logging_steps: count.default(1),
  eval_steps: count.optional(),
  save_steps: count.optional(),
  save_total_limit: count.optional(),
  resume_from_checkpoint: z.string().min(1).optional(),
  auto_resume_from_checkpoints: z.boolean().default(false),

  /** Not axolotl's: where to run, what memory it may take, and the sizes that the plan chooses by default. */
  device: z
    .string()
    .regex(/^(cpu|cuda(:\d+)?)$/, "expected 'cpu', 'cuda' or 'cuda:N'")
    .default('cpu'),
  /** All device memory that the process takes, CUDA context included, e.g. 24GiB; RAM that lc allocates. Default: what is free. */
  vram_limit: bytes.optional(),
  ram_limit: bytes.optional(),
  chunk_size: count.optional(),
  tile_size: count.optional(),
  loss_chunk_size: count.optional(),
  layers_per_segment: z.union([count, z.literal('auto')]).optional(),
});

/** A config file of `lc train`, checked, with every default filled in. */
export type TrainConfig = z.output<typeof schema>;
const keys = Object.keys(schema.shape);
const MAX_CONFIG_BYTES = 1 << 20;

interface Located {
  line: number | undefined;
  value: unknown;
}

/** Finds the line of a path (keys and indices) in the document; of the nearest parent when the path itself is missing. */
function locate(root: ParsedNode | null, path: readonly PropertyKey[], lines: LineCounter): number | undefined {
  let node: Node | null = root;
  let at = root?.range?.[0];
  for (const key of path) {
    if (isMap(node)) {
      const pair: { key: unknown; value: unknown } | undefined = node.items.find(
        (item) => isScalar(item.key) && String(item.key.value) === String(key),
      );
      if (!pair) break;
      at = (pair.key as Node).range?.[0] ?? at;
      node = (pair.value as Node | null) ?? null;
    } else if (isSeq(node)) {
      node = (node.items[Number(key)] as Node | undefined) ?? null;
      at = node?.range?.[0] ?? at;
    } else break;
  }
  return at === undefined ? undefined : lines.linePos(at).line;
}

function applySet(target: Record<string, unknown>, assignment: string): string {
  const equals = assignment.indexOf('=');
  if (equals < 1) throw new LcError('ERR_LC_CONFIG', `--set ${assignment}: expected key=value, e.g. --set learning_rate=1e-4`);
  const path = assignment.slice(0, equals).trim().split('.');
  const value: unknown = parse(assignment.slice(equals + 1));
  let node: Record<string, unknown> = target;
  for (const key of path.slice(0, -1)) {
    const next = Object.hasOwn(node, key) ? node[key] : undefined;
    if (next === null || typeof next !== 'object') node[key] = {};
    if (key === '__proto__') throw new LcError('ERR_LC_CONFIG', `--set ${assignment}: not a config key`);
    node = node[key] as Record<string, unknown>;
  }
  const last = path.at(-1) as string;
  if (last === '__proto__') throw new LcError('ERR_LC_CONFIG', `--set ${assignment}: not a config key`);
  node[last] = value;
  return path[0] as string;
}

/**
 * Checks a config's text.
 *
 * @param sets `key=value` overrides, values as YAML; `datasets.0.path=...` reaches inside.
 * @throws ERR_LC_CONFIG with every problem: its line, and for an unknown key the nearest known one.
 */
export function parseConfig(text: string, file: string, sets: readonly string[] = []): TrainConfig {
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false, uniqueKeys: true });
  const syntax = document.errors[0];
  if (syntax) throw new LcError('ERR_LC_CONFIG', `${file}:${lines.linePos(syntax.pos[0]).line}: not valid YAML: ${syntax.message}`);
  let value: unknown;
  try {
    value = document.toJS({ maxAliasCount: 100 }) as unknown;
  } catch (cause) {
    throw new LcError('ERR_LC_CONFIG', `${file}: ${(cause as Error).message}`, { cause });
  }
  if (value === null || typeof value !== 'object' || Array.isArray(value)) {
    throw new LcError('ERR_LC_CONFIG', `${file}: expected a mapping of options, e.g. base_model: ./model`);
  }
  const overridden = new Set(sets.map((assignment) => applySet(value as Record<string, unknown>, assignment)));
  const parsed = schema.safeParse(value);
  const problems: Located[] = [];
  const describe = (path: readonly PropertyKey[], message: string): void => {
    const fromSet = path.length > 0 && overridden.has(String(path[0]));
    problems.push({ line: fromSet ? undefined : locate(document.contents, path, lines), value: fromSet ? `--set: ${message}` : message });
  };
  if (!parsed.success) {
    for (const issue of parsed.error.issues) {
      if (issue.code === 'unrecognized_keys') {
        for (const key of issue.keys) {
          const near = suggest(key, issue.path.length === 0 ? keys : ['path', 'type']);
          describe([...issue.path, key], `unknown key '${[...issue.path, key].join('.')}'${near ? `; did you mean '${near}'?` : ''}`);
        }
      } else describe(issue.path, `${issue.path.join('.')}: ${issue.message}`);
    }
  } else {
    const c = parsed.data;
    if (c.adapter === 'qlora' && c.load_in_4bit === false)
      describe(['load_in_4bit'], 'load_in_4bit: false contradicts adapter: qlora; use adapter: lora');
    if (c.warmup_steps !== undefined && c.warmup_ratio > 0)
      describe(['warmup_ratio'], 'warmup_ratio: set warmup_steps or warmup_ratio, not both');
    if (c.lora_target_linear && c.lora_target_modules)
      describe(['lora_target_linear'], 'lora_target_linear: set it or lora_target_modules, not both');
    if (c.test_datasets && c.val_set_size > 0) describe(['val_set_size'], 'val_set_size: set it or test_datasets, not both');
    if (c.eval_steps && !c.test_datasets && c.val_set_size === 0)
      describe(['eval_steps'], 'eval_steps: nothing to evaluate on; set val_set_size or test_datasets');
  }
  if (problems.length > 0) {
    problems.sort((a, b) => (a.line ?? 0) - (b.line ?? 0));
    throw new LcError('ERR_LC_CONFIG', problems.map((p) => `${file}${p.line === undefined ? '' : `:${p.line}`}: ${p.value}`).join('\n'));
  }
  return parsed.data as TrainConfig;
}

/** Reads and checks a config file; paths in it become absolute, relative to the file's folder. */
export function loadConfig(file: string, sets: readonly string[] = []): TrainConfig {
  let text: string;
  try {
    if (statSync(file).size > MAX_CONFIG_BYTES) throw new LcError('ERR_LC_CONFIG', `${file}: larger than 1 MiB; is this the right file?`);
    text = readFileSync(file, 'utf8');
  } catch (cause) {
    if (cause instanceof LcError) throw cause;
    throw new LcError('ERR_LC_CONFIG', `${file}: ${(cause as Error).message}`, { cause });
  }
  const config = parseConfig(text, file, sets);
  const base = dirname(resolve(file));
  const absolute = (path: string): string => (isAbsolute(path) ? path : resolve(base, path));
  config.base_model = absolute(config.base_model);
  config.output_dir = absolute(config.output_dir);
  if (config.resume_from_checkpoint) config.resume_from_checkpoint = absolute(config.resume_from_checkpoint);
  for (const set of [config.datasets, config.test_datasets ?? []]) for (const d of set) d.path = absolute(d.path);
  return config;
}

/** JSON schema of the config, for editors. */
export function configSchema(): unknown {
  return z.toJSONSchema(schema, { io: 'input' });
}
