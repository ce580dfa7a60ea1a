/**
 * `SFTTrainer`: supervised fine-tuning of a LoRA adapter, step by step.
 *
 * Features: gradient accumulation that divides by the global count of supervised tokens; learning-rate schedules; clipping; evaluation; checkpoints written
 * atomically, resumed bit for bit on the CPU; abort between chunks; a stop on NaN that keeps the last good adapter; events for every step.
 * Costs: one plan's memory, reserved before the first step, and again when the longest sequence, the limits or free memory change; see `plan` events.
 * Raises: ERR_LC_CONFIG, ERR_LC_NOTHING_SUPERVISED, ERR_LC_NAN, ERR_LC_ADAPTER, ERR_LC_PLAN, ERR_LC_IO.
 */
import { createHash } from 'node:crypto';
import { join, resolve } from 'node:path';
import type { PackedSequence } from '@lc/data';
import { deviceMemory, LcError, resetPeak } from '@lc/tensor';
import { type ResolvedSFTConfig, resolveArgs, type SFTConfig } from './args.js';
import { TrainingEngine } from './engine.js';
import type { PlanEvent, StepEvent, TrainerEvent } from './events.js';
import type { LanguageModel } from './fast-language-model.js';
import { writeFileAtomic, writeFolderAtomic } from './files.js';
import { checkAdapterGradients, checkGroups } from './gradients.js';
import { MetricsFile } from './metrics.js';
import { learningRateAt } from './schedule.js';
import { completeCheckpoints, pruneCheckpoints, readState, type TrainerState } from './state.js';

/** Training data: `PackedDataset` of `@lc/data`, or anything with the same methods. */
export interface TrainDataset {
  /** The next sequence; epochs follow each other. */
  next(): PackedSequence;
  /** Sequences in an epoch. */
  length(epoch?: number): number;
  /** Where the iteration stands, as JSON: it goes into checkpoints. */
  state(): unknown;
  /** Goes on from a state. @throws where the state is not of this data */
  restore(state: unknown): void;
}
/** Evaluation data. */
export interface EvalDataset {
  /** All sequences of one epoch. */
  epoch(n?: number): Iterable<PackedSequence>;
}

/** Model, data and arguments of a run. */
export interface SFTTrainerOptions {
  model: LanguageModel;
  trainDataset: TrainDataset;
  evalDataset?: EvalDataset;
  args: SFTConfig;
  /** Called for every event; must not throw. */
  onEvent?: (event: TrainerEvent) => void;
}

/** Cancellation and resuming. */
export interface TrainOptions {
  /** Stops between two chunks; the adapter so far is saved and `train` resolves with reason 'aborted'. */
  signal?: AbortSignal;
  /** A checkpoint-N folder, or true for the newest complete one of outputDir. */
  resumeFrom?: string | boolean;
}

/** What `train` resolves with. */
export interface TrainOutput {
  reason: 'finished' | 'aborted';
  globalStep: number;
  /** Loss of every step done, from the first run on. */
  losses: number[];
  /** Mean loss over the steps of this call. */
  trainingLoss: number;
  /** Folder of the final adapter. */
  adapter: string;
}

/**
 * Supervised fine-tuning of a model's adapter (TRL's name). Memory is planned and taken before the first step; one run of a seed gives the same bits
 * as another.
 */
export class SFTTrainer implements Disposable {
  readonly args: ResolvedSFTConfig;
  private readonly model: LanguageModel;
  private readonly data: TrainDataset;
  private readonly evalData: EvalDataset | undefined;
  private readonly listeners: ((event: TrainerEvent) => void)[] = [];
  private readonly metrics: MetricsFile;
  private engine: TrainingEngine | undefined;

  constructor(options: SFTTrainerOptions) {
    this.args = resolveArgs(options.args);
    this.model = options.model;
    this.data = options.trainDataset;
    this.evalData = options.evalDataset;
    if (options.onEvent) this.listeners.push(options.onEvent);
    if (this.model.parameters.length === 0) {
      throw new LcError('ERR_LC_ADAPTER', 'SFTTrainer: the model has nothing to train; call FastLanguageModel.getPeftModel first');
    }
    this.metrics = new MetricsFile(this.args.outputDir, (message) => this.emit({ type: 'warning', message }));
  }

  /** What a run would take and do, without running it; reserves its memory. @throws ERR_LC_PLAN, ERR_LC_OUT_OF_MEMORY */
  plan(): PlanEvent {
    return this.planEvent(this.ready(), this.steps().totalSteps);
  }

  /**
   * New limits of device memory and RAM, in bytes (null: none), from the next step on; a plan that they do not hold is made again.
   * A plan that then does not fit ends the run with ERR_LC_PLAN.
   */
  setLimits(limits: { vramLimit?: number | null; ramLimit?: number | null }): void {
    this.ready().setLimits(limits);
  }

  /** Trains to the end of the schedule, or until aborted. */
  async train(options: TrainOptions = {}): Promise<TrainOutput> {
    const { args } = this;
    const { stepsPerEpoch, totalSteps } = this.steps();
    const warmupSteps = args.warmupSteps ?? Math.ceil(args.warmupRatio * totalSteps);
    const engine = this.ready();
    const fingerprint = this.fingerprint(totalSteps);

    let step = 0;
    const losses: number[] = [];
    const resumeFolder = this.resumeFolder(options.resumeFrom);
    if (resumeFolder) {
      const state = readState(resumeFolder, fingerprint);
      await this.model.loadAdapterWeights(resumeFolder);
      await engine.loadOptimizer(resumeFolder, state.optimizerStep);
      this.data.restore(state.data);
      step = state.globalStep;
      losses.push(...state.lossHistory);
    }
    this.emit(this.planEvent(engine, totalSteps));

    const first = step;
    const started = performance.now();
    resetPeak();
    let reason: TrainOutput['reason'] = 'finished';
    let dataState = this.data.state();
    while (step < totalSteps) {
      if (options.signal?.aborted) {
        reason = 'aborted';
        break;
      }
      dataState = this.data.state();
      const event = await this.step(engine, step, { totalSteps, warmupSteps, stepsPerEpoch, started, first, signal: options.signal });
      if (!event) {
        this.data.restore(dataState); // an unfinished step is taken again on resume
        reason = 'aborted';
        break;
      }
      step++;
      losses.push(event.loss);
      if (step % args.loggingSteps === 0 || step === totalSteps) this.emit(event);
      if (args.evalSteps && step % args.evalSteps === 0 && step < totalSteps) await this.evaluateAt(step);
      if (args.saveSteps && step % args.saveSteps === 0) await this.save(engine, step, totalSteps, fingerprint, losses);
    }
    if (reason === 'aborted') await this.save(engine, step, totalSteps, fingerprint, losses);
    else if (this.evalData) await this.evaluateAt(step);
    const adapter = await this.saveModel();
    this.emit({ type: 'end', reason, step, adapter });
    const own = losses.slice(first);
    return { reason, globalStep: step, losses, trainingLoss: own.reduce((a, b) => a + b, 0) / Math.max(1, own.length), adapter };
  }

  /** Mean loss over the supervised tokens of the evaluation data; no gradients, no dropout. */
  async evaluate(dataset: EvalDataset | undefined = this.evalData): Promise<{ loss: number; supervisedTokens: number }> {
    if (!dataset) throw new LcError('ERR_LC_CONFIG', 'SFTTrainer.evaluate: no evalDataset was given');
    const engine = this.ready();
    let sum = 0;
    let supervisedTokens = 0;
    for (const sequence of dataset.epoch(0)) {
      if (sequence.supervised === 0) continue;
      await this.prepare(engine, sequence.inputIds.length, this.steps().totalSteps);
      sum += (await engine.evaluate(sequence)) * sequence.supervised;
      supervisedTokens += sequence.supervised;
    }
    if (supervisedTokens === 0)
      throw new LcError('ERR_LC_NOTHING_SUPERVISED', 'SFTTrainer.evaluate: every label of the evaluation data is ignored (-100)');
    return { loss: sum / supervisedTokens, supervisedTokens };
  }

  /** Writes the adapter (PEFT format) to a folder, default outputDir. Returns the folder. */
  async saveModel(folder: string = this.args.outputDir): Promise<string> {
    const path = resolve(folder);
    await this.model.savePretrained(path);
    return path;
  }

  /** Frees the engine's memory; the model stays. */
  dispose(): void {
    this.engine?.dispose();
    this.engine = undefined;
  }
  /** For `using`: `dispose()`. */
  [Symbol.dispose](): void {
    this.dispose();
  }

  private steps(): { stepsPerEpoch: number; totalSteps: number } {
    const { args } = this;
    const stepsPerEpoch = Math.max(1, Math.floor(this.data.length(0) / (args.perDeviceTrainBatchSize * args.gradientAccumulationSteps)));
    return { stepsPerEpoch, totalSteps: args.maxSteps ?? Math.max(1, Math.ceil(args.numTrainEpochs * stepsPerEpoch)) };
  }

  private ready(): TrainingEngine {
    this.engine ??= new TrainingEngine(this.model, this.args, (message) => this.emit({ type: 'warning', message }));
    return this.engine;
  }

  /** Makes the plan again where the sequence, the limits or free memory ask for it, and tells so. */
  private async prepare(engine: TrainingEngine, tokens: number, totalSteps: number): Promise<void> {
    const reason = await engine.prepare(tokens);
    if (reason) this.emit({ ...this.planEvent(engine, totalSteps), reason });
  }

  /** One optimizer step; undefined when it was aborted: gradients are dropped, parameters unchanged. */
  private async step(
    engine: TrainingEngine,
    step: number,
    run: {
      totalSteps: number;
      warmupSteps: number;
      stepsPerEpoch: number;
      started: number;
      first: number;
      signal: AbortSignal | undefined;
    },
  ): Promise<StepEvent | undefined> {
    const { args } = this;
    const start = performance.now();
    const sequences = Array.from({ length: args.perDeviceTrainBatchSize * args.gradientAccumulationSteps }, () => this.data.next());
    const tokens = sequences.reduce((sum, s) => sum + s.inputIds.length, 0);
    const supervised = sequences.reduce((sum, s) => sum + s.supervised, 0);
    if (supervised === 0) {
      throw new LcError(
        'ERR_LC_NOTHING_SUPERVISED',
        `step ${step + 1}: all ${tokens} labels are ignored (-100), so there is nothing to learn; check the mask and the chat template`,
      );
    }
    await this.prepare(engine, Math.max(...sequences.map((sequence) => sequence.inputIds.length)), run.totalSteps);
    engine.optimizer.zeroGrad();
    let loss = 0;
    for (const [i, sequence] of sequences.entries()) {
      if (sequence.supervised === 0) continue;
      const part = await engine.step(sequence, {
        numTokens: supervised,
        dropoutSeed: (args.seed + Math.imul(step * sequences.length + i + 1, 0x9e3779b1)) >>> 0,
        signal: run.signal,
        onProgress: (phase, fraction) =>
          this.emit({ type: 'progress', step: step + 1, phase, fraction: (i + fraction) / sequences.length }),
      });
      if (part === undefined) {
        engine.optimizer.zeroGrad();
        return undefined;
      }
      loss += part;
    }
    if (step === 0) checkAdapterGradients(this.model.parameters);
    const learningRate = learningRateAt(step, {
      type: args.lrSchedulerType,
      learningRate: args.learningRate,
      warmupSteps: run.warmupSteps,
      totalSteps: run.totalSteps,
    });
    engine.optimizer.lr = learningRate;
    const { gradNorm, applied } = Number.isFinite(loss)
      ? engine.optimizer.step(args.maxGradNorm > 0 ? { maxGradNorm: args.maxGradNorm } : {})
      : { gradNorm: engine.optimizer.gradNorm(), applied: false };
    if (!applied) {
      throw new LcError(
        'ERR_LC_NAN',
        `step ${step + 1}: loss ${loss}, gradient norm ${gradNorm}; stopped before the update, the parameters are those of step ${step}. ` +
          'Lower learningRate, clip with maxGradNorm, or check the base weights',
      );
    }
    const seconds = (performance.now() - start) / 1000;
    const done = step + 1 - run.first;
    const elapsed = (performance.now() - run.started) / 1000;
    const device = this.model.device;
    return {
      type: 'step',
      step: step + 1,
      totalSteps: run.totalSteps,
      epoch: (step + 1) / run.stepsPerEpoch,
      loss,
      learningRate,
      gradNorm,
      tokens,
      supervisedTokens: supervised,
      supervisedShare: supervised / tokens,
      seconds,
      tokensPerSecond: tokens / seconds,
      deviceBytes: deviceMemory(device).peakBytes,
      hostBytes: deviceMemory('host').peakBytes,
      etaSeconds: (elapsed / done) * (run.totalSteps - step - 1),
    };
  }

  private async evaluateAt(step: number): Promise<void> {
    this.emit({ type: 'eval', step, ...(await this.evaluate()) });
  }

  private async save(
    engine: TrainingEngine,
    step: number,
    totalSteps: number,
    fingerprint: string,
    losses: readonly number[],
  ): Promise<void> {
    const folder = join(resolve(this.args.outputDir), `checkpoint-${step}`);
    await writeFolderAtomic(folder, async (temporary) => {
      await this.model.savePretrained(temporary);
      await engine.saveOptimizer(temporary);
      const state: TrainerState = {
        schema: 1,
        globalStep: step,
        totalSteps,
        fingerprint,
        optimizerStep: engine.optimizer.stepsTaken,
        data: this.data.state(),
        lossHistory: [...losses],
      };
      writeFileAtomic(join(temporary, 'trainer_state.json'), `${JSON.stringify(state, null, 2)}\n`);
    });
    if (this.args.saveTotalLimit) pruneCheckpoints(resolve(this.args.outputDir), this.args.saveTotalLimit);
    this.emit({ type: 'save', step, path: folder });
  }

  private resumeFolder(resumeFrom: string | boolean | undefined): string | undefined {
    if (resumeFrom === undefined || resumeFrom === false) return undefined;
    if (typeof resumeFrom === 'string') return resolve(resumeFrom);
    const newest = completeCheckpoints(resolve(this.args.outputDir)).at(-1);
    if (!newest) throw new LcError('ERR_LC_DATA', `resume: no complete checkpoint-N folder in ${resolve(this.args.outputDir)}`);
    return newest.path;
  }

  /** Changes when an option does that would make a resumed run differ from an uninterrupted one. */
  private fingerprint(totalSteps: number): string {
    const {
      outputDir: _,
      maxSteps: __,
      numTrainEpochs: ___,
      loggingSteps: ____,
      evalSteps,
      saveSteps,
      saveTotalLimit,
      vramLimit,
      ramLimit,
      keep,
      ...fixed
    } = this.args;
    void [evalSteps, saveSteps, saveTotalLimit, vramLimit, ramLimit, keep];
    const names = this.model.parameters.map((p) => `${p.name}[${p.value.shape.join(',')}]`);
    return createHash('sha256')
      .update(JSON.stringify({ ...fixed, totalSteps, names, sequences: this.data.length(0) }))
      .digest('hex')
      .slice(0, 16);
  }

  private planEvent(engine: TrainingEngine, totalSteps: number): PlanEvent {
    checkGroups(this.model.parameters);
    return {
      type: 'plan',
      ...engine.plan,
      totalSteps,
      trainableParameters: this.model.parameters.reduce((sum, p) => sum + p.value.numel, 0),
    };
  }

  private emit(event: TrainerEvent): void {
    this.metrics.write(event);
    for (const listener of this.listeners) listener(event);
  }
}
