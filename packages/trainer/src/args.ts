import { LcError } from '@lc/tensor';
import { z } from 'zod';

/** Learning-rate schedules, as transformers names and computes them. */
export const lrSchedulerTypes = ['linear', 'cosine', 'constant', 'constant_with_warmup'] as const;
export type LrSchedulerType = (typeof lrSchedulerTypes)[number];

const count = z.number().int().positive();
const fraction = z.number().min(0).lt(1);

const schema = z.strictObject({
  /** Run folder: checkpoints, metrics.jsonl, the final adapter. */
  outputDir: z.string().min(1),
  /** Optimizer steps; wins over numTrainEpochs. */
  maxSteps: count.optional(),
  numTrainEpochs: z.number().positive().default(1),
  /** Packed sequences per micro-step group; they run one after the other, so this only multiplies accumulation. */
  perDeviceTrainBatchSize: count.default(1),
  gradientAccumulationSteps: count.default(1),
  learningRate: z.number().positive().default(2e-4),
  lrSchedulerType: z.enum(lrSchedulerTypes).default('linear'),
  warmupSteps: z.number().int().nonnegative().optional(),
  warmupRatio: fraction.default(0),
  weightDecay: z.number().nonnegative().default(0.01),
  adamBeta1: fraction.default(0.9),
  adamBeta2: fraction.default(0.999),
  adamEpsilon: z.number().positive().default(1e-8),
  /** Clip the global gradient norm; 0 = off. */
  maxGradNorm: z.number().nonnegative().default(1),
  optim: z.enum(['adamw_torch', 'adamw_8bit']).default('adamw_torch'),
  seed: z.number().int().nonnegative().max(0xffffffff).default(3407),
  /** Same seed, same bits. False: faster attention backward on a GPU, at head dims up to 64 (on Hopper cards up to 128), whose dQ is summed in no fixed order. */
  deterministic: z.boolean().default(true),
  loggingSteps: count.default(1),
  /** Evaluate on evalDataset every N steps; default only at the end. */
  evalSteps: count.optional(),
  /** Write checkpoint-N every N steps; default none but the final adapter. */
  saveSteps: count.optional(),
  /** Keep the newest N checkpoints. */
  saveTotalLimit: count.optional(),
  /** Tokens of a chunk of the layers x chunks schedule; default from the plan. */
  chunk: count.optional(),
  /** Rows of logits alive at once; default from the plan. */
  lossChunk: count.optional(),
  /** Bytes of gradient checkpoints kept on the device; the rest lies in host memory. Default from the plan. */
  checkpointDeviceBytes: z.number().int().nonnegative().optional(),
  /** Tokens of an MLP tile; default from the plan. */
  tile: count.optional(),
  /** Full-attention layers whose attention output is kept for backward: more memory, less time, the same bits; 'auto': of all of them the last tokens, as many as fit. */
  keep: z.union([z.number().int().nonnegative(), z.literal('auto')]).default('auto'),
  /** Layers per gradient checkpoint; 'auto': what makes the step fastest. */
  layersPerSegment: z.union([count, z.literal('auto')]).default(1),
  /** Longest sequence, for the plan; default the model's maxSeqLength. */
  maxSeqLength: count.optional(),
  /** Bytes of device memory that this process may take, CUDA context and libraries included; default what is free. */
  vramLimit: z.number().int().positive().optional(),
  /** Bytes of RAM that lc's allocator may take; plans take at most 90% of what is free. */
  ramLimit: z.number().int().positive().optional(),
});

/** Options of `SFTTrainer`, in transformers' names (TrainingArguments, TRL's SFTConfig). */
export type SFTConfig = z.input<typeof schema>;
/** `SFTConfig` with every default filled in. */
export type ResolvedSFTConfig = z.output<typeof schema>;

/** Fills in defaults. @throws ERR_LC_CONFIG naming every option that is unknown or out of range. */
export function resolveArgs(args: SFTConfig): ResolvedSFTConfig {
  const parsed = schema.safeParse(args);
  if (parsed.success) return parsed.data;
  const problems = parsed.error.issues.map((issue) => `  ${issue.path.join('.') || 'args'}: ${issue.message}`);
  throw new LcError('ERR_LC_CONFIG', `SFTTrainer: args are not valid:\n${problems.join('\n')}`);
}

/** The option names, for did-you-mean. */
export const argNames: readonly string[] = Object.keys(schema.shape);
