/** `lc train config.yaml` */
import { existsSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { loadDataset, type PackedDataset } from '@lc/data';
import { LcError } from '@lc/tensor';
import type { SFTConfig } from '../args.js';
import type { TrainerEvent } from '../events.js';
import { FastLanguageModel } from '../fast-language-model.js';
import { writeFileAtomic } from '../files.js';
import { formatTrainableTable, trainableTable } from '../gradients.js';
import { eventLine } from '../metrics.js';
import { SFTTrainer } from '../sft-trainer.js';
import { completeCheckpoints } from '../state.js';
import { loadConfig, type TrainConfig } from './config.js';
import { ProgressDisplay } from './progress.js';

interface TrainFlags {
  set: string[];
  dryRun?: boolean;
  resume?: string | boolean;
  json?: boolean;
}

function argsOf(c: TrainConfig): SFTConfig {
  const defined = <T extends object>(o: T): T => Object.fromEntries(Object.entries(o).filter(([, v]) => v !== undefined)) as T;
  return defined({
    outputDir: c.output_dir,
    maxSteps: c.max_steps,
    numTrainEpochs: c.num_epochs,
    perDeviceTrainBatchSize: c.micro_batch_size,
    gradientAccumulationSteps: c.gradient_accumulation_steps,
    learningRate: c.learning_rate,
    lrSchedulerType: c.lr_scheduler,
    warmupSteps: c.warmup_steps,
    warmupRatio: c.warmup_ratio,
    weightDecay: c.weight_decay,
    adamBeta1: c.adam_beta1,
    adamBeta2: c.adam_beta2,
    adamEpsilon: c.adam_epsilon,
    maxGradNorm: c.max_grad_norm,
    optim: c.optimizer === 'adamw_torch' ? ('adamw_torch' as const) : ('adamw_8bit' as const),
    seed: c.seed,
    deterministic: c.deterministic,
    loggingSteps: c.logging_steps,
    evalSteps: c.eval_steps,
    saveSteps: c.save_steps,
    saveTotalLimit: c.save_total_limit,
    chunk: c.chunk_size,
    lossChunk: c.loss_chunk_size,
    layersPerSegment: c.layers_per_segment,
    vramLimit: c.vram_limit,
    ramLimit: c.ram_limit,
    maxSeqLength: c.sequence_len,
  });
}

const types = { text: 'text', completion: 'jsonl', chat_template: 'jsonl' } as const;

export async function trainCommand(configFile: string, flags: TrainFlags): Promise<void> {
  const config = loadConfig(configFile, flags.set);
  const display = new ProgressDisplay();
  const note = (message: string): void => void process.stderr.write(`${message}\n`);
  const emit = (event: TrainerEvent): void => {
    if (flags.json) process.stdout.write(eventLine(event));
    display.handle(event);
  };

  const loaded = await FastLanguageModel.fromPretrained(config.base_model, {
    maxSeqLength: config.sequence_len,
    loadIn4bit: config.load_in_4bit ?? config.adapter === 'qlora',
    device: config.device as 'cpu',
    ...(config.tile_size ? { tile: config.tile_size } : {}),
    ...(config.rope_scaling ? { ropeScaling: config.rope_scaling } : {}),
  });
  const { tokenizer } = loaded;
  using model = FastLanguageModel.getPeftModel(loaded.model, {
    r: config.lora_r,
    loraAlpha: config.lora_alpha,
    loraDropout: config.lora_dropout,
    useRslora: config.peft_use_rslora,
    randomState: config.seed,
    ...(config.lora_target_linear
      ? { targetModules: 'all-linear' as const }
      : config.lora_target_modules
        ? { targetModules: config.lora_target_modules }
        : {}),
    ...(config.lora_target_parameters ? { targetParameters: config.lora_target_parameters } : {}),
  });
  note(`model  ${config.base_model} on ${model.device}\n${formatTrainableTable(trainableTable(model.parameters))}`);

  const read = (sets: NonNullable<TrainConfig['test_datasets']>, shuffle: boolean): Promise<PackedDataset> => {
    const kinds = new Set(sets.map((d) => (d.type ? types[d.type] : 'auto')));
    if (kinds.size > 1)
      throw new LcError('ERR_LC_CONFIG', 'datasets: all entries must have the same type for now; leave type out to go by file name');
    return loadDataset({
      paths: sets.map((d) => d.path),
      tokenizer,
      maxLength: config.sequence_len,
      type: [...kinds][0] ?? 'auto',
      packing: config.sample_packing,
      excessLengthStrategy: config.excess_length_strategy,
      seed: config.seed,
      shuffle,
      onNotice: (message) => emit({ type: 'warning', message }),
    });
  };
  let train = await read(config.datasets, true);
  let test = config.test_datasets ? await read(config.test_datasets, false) : undefined;
  if (config.val_set_size > 0) {
    const count = config.val_set_size < 1 ? Math.max(1, Math.round(config.val_set_size * train.length(0))) : config.val_set_size;
    ({ train, test } = train.split(count));
  }
  const supervised = [...train.epoch(0)].reduce((sum, s) => sum + s.supervised, 0);
  note(
    `data   ${train.length(0)} sequences, ${train.tokens} tokens, ${((100 * supervised) / train.tokens).toFixed(1)}% supervised${test ? `; held out: ${test.length(0)} sequences` : ''}`,
  );

  using trainer = new SFTTrainer({
    model,
    trainDataset: train,
    ...(test ? { evalDataset: test } : {}),
    args: argsOf(config),
    onEvent: emit,
  });
  if (flags.dryRun) {
    emit(trainer.plan());
    return;
  }
  writeFileAtomic(join(config.output_dir, 'config.resolved.json'), `${JSON.stringify(config, null, 2)}\n`);

  let resumeFrom: string | boolean | undefined = typeof flags.resume === 'string' ? resolve(flags.resume) : flags.resume;
  resumeFrom ??= config.resume_from_checkpoint;
  if (resumeFrom === undefined && config.auto_resume_from_checkpoints && existsSync(config.output_dir)) {
    resumeFrom = completeCheckpoints(config.output_dir).length > 0;
  }

  // The first signal stops between two chunks and saves; a second one ends the process at once.
  const abort = new AbortController();
  let stopped: 'SIGINT' | 'SIGTERM' | undefined;
  const onSignal = (signal: 'SIGINT' | 'SIGTERM'): void => {
    if (stopped) process.exit(signal === 'SIGINT' ? 130 : 143);
    stopped = signal;
    note(`\n${signal}: stopping after this chunk and saving; again to stop at once`);
    abort.abort();
  };
  process.on('SIGINT', onSignal);
  process.on('SIGTERM', onSignal);
  try {
    const result = await trainer.train({ signal: abort.signal, ...(resumeFrom === undefined ? {} : { resumeFrom }) });
    if (result.reason === 'aborted') process.exitCode = stopped === 'SIGTERM' ? 143 : 130;
  } finally {
    display.stop();
    process.off('SIGINT', onSignal);
    process.off('SIGTERM', onSignal);
  }
}
