/** What a run holds: one plan's memory, the session that adds gradients, and the optimizer with its file. */
import { join } from 'node:path';
import type { PackedSequence } from '@lc/data';
import { AdamW } from '@lc/qlora';
import { deviceMemory, fromTypedArray, Scope } from '@lc/tensor';
import { openSafetensors, writeSafetensors } from '@lc/tensor/safetensors';
import type { ResolvedSFTConfig } from './args.js';
import type { Limits } from './budgets.js';
import type { PlanEvent } from './events.js';
import type { LanguageModel } from './fast-language-model.js';
import { StepMemory } from './step-memory.js';

export interface EngineStepOptions {
  /** Supervised tokens of the whole optimizer step. */
  numTokens: number;
  dropoutSeed: number;
  signal: AbortSignal | undefined;
  onProgress: (phase: 'forward' | 'loss' | 'backward', fraction: number) => void;
}

const OPTIMIZER_FILE = 'optimizer.safetensors';

export class TrainingEngine implements Disposable {
  readonly optimizer: AdamW;
  private readonly memory: StepMemory;
  private readonly model: LanguageModel;
  /** What lay on the device before a step's memory. */
  private readonly before: number;
  private readonly scope = new Scope();

  /** @throws ERR_LC_PLAN when it does not fit (the budget and the longest length that does are named), ERR_LC_OUT_OF_MEMORY */
  constructor(model: LanguageModel, args: ResolvedSFTConfig, onWarning: (message: string) => void = () => {}) {
    const tokens = args.maxSeqLength ?? model.maxSeqLength;
    this.model = model;
    try {
      this.optimizer = this.scope.own(
        new AdamW(model.parameters, {
          lr: args.learningRate,
          betas: [args.adamBeta1, args.adamBeta2],
          eps: args.adamEpsilon,
          weightDecay: args.weightDecay,
          optimBits: args.optim === 'adamw_8bit' ? 8 : 32,
        }),
      );
      this.before = deviceMemory(model.device).liveBytes;
      this.memory = this.scope.own(
        new StepMemory({
          ...{ model: model.inner, tokens, chunk: args.chunk, tile: args.tile ?? model.tile, lossChunk: args.lossChunk, onWarning },
          ...{ vramLimit: args.vramLimit, ramLimit: args.ramLimit, layersPerSegment: args.layersPerSegment },
          ...{ checkpointDeviceBytes: args.checkpointDeviceBytes, keep: args.keep, deterministic: args.deterministic },
        }),
      );
    } catch (error) {
      this.scope.dispose();
      throw error;
    }
  }

  get plan(): Omit<PlanEvent, 'type' | 'totalSteps' | 'trainableParameters'> {
    const { plan: p } = this.memory;
    return {
      ...{ device: this.model.device, tokens: p.tokens, chunk: p.chunk, tile: p.tile, lossChunk: p.lossChunk },
      predictedDeviceBytes: p.predictedPeak.device + this.before,
      predictedHostBytes: p.predictedPeak.host,
    };
  }

  /** New limits, from the next step on. */
  setLimits(limits: Limits): void {
    this.memory.setLimits(limits);
  }

  /** Before a step over sequences of at most `tokens`: why the plan was made again, or null. @throws as the constructor */
  async prepare(tokens: number): Promise<string | null> {
    return this.memory.prepare(Math.min(tokens, this.model.maxSeqLength)); // beyond it the session refuses
  }

  /** Adds a sequence's gradients; its share of the step's loss, or undefined when aborted. */
  async step(sequence: PackedSequence, options: EngineStepOptions): Promise<number | undefined> {
    const { numTokens, dropoutSeed, signal, onProgress } = options;
    // Backward costs about as much as two forwards and their recomputation.
    const share = { forward: [0, 0.25], loss: [0.25, 0.3], backward: [0.3, 1] } as const;
    try {
      const { loss } = await this.memory.session.step(sequence, {
        numTokens,
        dropoutSeed,
        signal,
        onProgress: ({ phase, done, total }) => {
          const part = phase === 'input' || phase === 'forward' ? 'forward' : phase === 'loss' ? 'loss' : 'backward';
          const [from, to] = share[part];
          onProgress(part, from + ((to - from) * done) / total);
        },
      });
      return loss;
    } catch (error) {
      if ((error as { code?: string }).code === 'ERR_LC_ABORTED') return undefined;
      throw error;
    }
  }

  /** Mean loss of a sequence. */
  async evaluate(sequence: PackedSequence): Promise<number> {
    return (await this.memory.session.evaluate(sequence)).loss;
  }

  async saveOptimizer(folder: string): Promise<void> {
    const { tensors } = this.optimizer.state();
    await writeSafetensors(
      join(folder, OPTIMIZER_FILE),
      Object.entries(tensors).map(([name, data]) => ({ name, data })),
      { format: 'lc' },
    );
  }

  /** @throws ERR_LC_ADAPTER when the file does not fit the parameters, ERR_LC_SAFETENSORS, ERR_LC_IO */
  async loadOptimizer(folder: string, step: number): Promise<void> {
    using file = await openSafetensors(join(folder, OPTIMIZER_FILE));
    const tensors: Record<string, Float32Array | Uint8Array> = {};
    for (const name of file.names) {
      const { shape, dtype } = file.info(name);
      const length = shape.reduce((a, b) => a * b, 1);
      const data = dtype === 'u8' ? new Uint8Array(length) : new Float32Array(length);
      using target = fromTypedArray(data, shape, { label: 'optimizer' });
      await file.readInto(name, target);
      tensors[name] = data;
    }
    this.optimizer.restore({ step, tensors });
  }

  dispose(): void {
    this.scope.dispose();
  }
  [Symbol.dispose](): void {
    this.dispose();
  }
}
