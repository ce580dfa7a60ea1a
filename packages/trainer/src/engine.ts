/** What a run holds: one plan's memory, the session that adds gradients, and the optimizer with its file. */
import { join } from 'node:path';
import type { PackedSequence } from '@lc/data';
import { TrainingSession } from '@lc/models';
import { AdamW } from '@lc/qlora';
import { deviceMemory, fromTypedArray, LcError, Scope, Workspace } from '@lc/tensor';
import { openSafetensors, writeSafetensors } from '@lc/tensor/safetensors';
import { plan } from '@lc/vram-probe';
import type { ResolvedSFTConfig } from './args.js';
import type { PlanEvent } from './events.js';
import type { LanguageModel } from './fast-language-model.js';

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
  readonly plan: Omit<PlanEvent, 'type' | 'totalSteps' | 'trainableParameters'>;
  private readonly session: TrainingSession;
  private readonly scope = new Scope();

  /** @throws ERR_LC_PLAN when it does not fit (the longest length that does is named), ERR_LC_OUT_OF_MEMORY */
  constructor(model: LanguageModel, args: ResolvedSFTConfig) {
    const tokens = args.maxSeqLength ?? model.maxSeqLength;
    const trainable = model.parameters.reduce((sum, p) => sum + p.value.numel, 0);
    const p = plan({
      model: model.shape,
      tokens,
      device: model.device.startsWith('cuda') ? 'cuda' : 'cpu',
      trainableParameters: trainable,
      weightBytes: 0, // loaded already, so it is no longer part of what is free
      optimBits: args.optim === 'adamw_8bit' ? 8 : 32,
      layersPerSegment: args.layersPerSegment,
      tile: model.tile,
      ...(args.chunk === undefined ? {} : { chunk: args.chunk }),
      ...(args.lossChunk === undefined ? {} : { lossChunk: args.lossChunk }),
      ...(args.vramLimit === undefined ? {} : { vramBudget: args.vramLimit }),
      ...(args.checkpointDeviceBytes === undefined ? {} : { checkpointDeviceBytes: args.checkpointDeviceBytes }),
    });
    if (!p.fits)
      throw new LcError(
        'ERR_LC_PLAN',
        `${tokens} tokens do not fit: ${p.reasons.join('; ')}. The longest length that fits: ${p.maxTokens}`,
      );
    this.plan = {
      device: model.device,
      tokens,
      chunk: p.chunk,
      tile: p.tile,
      lossChunk: p.lossChunk,
      // What is loaded already (weights, adapters) stays; the plan counts the adapters, too.
      predictedDeviceBytes: p.predictedPeak.device - p.bytes.adapters + deviceMemory(model.device).liveBytes,
      predictedHostBytes: p.predictedPeak.host,
    };
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
      const ws = this.scope.own(new Workspace({ device: model.device, label: 'workspace', bytes: p.bytes.workspace }));
      this.session = this.scope.own(
        new TrainingSession({
          model: model.inner,
          tokens,
          chunk: p.chunk,
          lossChunk: p.lossChunk,
          ws,
          storeOptions: { deviceBytes: p.checkpoints.deviceBytes, layersPerSegment: args.layersPerSegment },
        }),
      );
    } catch (error) {
      this.scope.dispose();
      throw error;
    }
  }

  /** Adds a sequence's gradients; its share of the step's loss, or undefined when aborted. */
  async step(sequence: PackedSequence, options: EngineStepOptions): Promise<number | undefined> {
    const { numTokens, dropoutSeed, signal, onProgress } = options;
    // Backward costs about as much as two forwards and their recomputation.
    const share = { forward: [0, 0.25], loss: [0.25, 0.3], backward: [0.3, 1] } as const;
    try {
      const { loss } = await this.session.step(sequence, {
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
    return (await this.session.evaluate(sequence)).loss;
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
