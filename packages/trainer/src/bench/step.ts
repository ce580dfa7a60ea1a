/** `lc bench step`: training steps of a model with random weights, its real dimensions and its real formats. The weights are made once for all runs of a command. */
import { type CausalLM, syntheticModel } from '@lc/models';
import { AdamW } from '@lc/qlora';
import { type DeviceLike, defaultStream, deviceMemory, LcError, Scope } from '@lc/tensor';
import { stepFlops } from './flops.js';
import { applyCaps } from './memory-caps.js';
import { count, gibibytes, newReport, type OutputOptions, type Report, type Row, save } from './report.js';
import { type Optimization, optimizations, type StepCase } from './step-case.js';
import { type CompareResult, checkChunk, compare, randomizeLoraB } from './step-compare.js';
import { isShort, runStep, type StepIo, type StepResult } from './step-run.js';
import { search } from './step-search.js';
import { checkTable, compareTable, opTable, phaseTable, stepTable, table1 as table1Table } from './step-tables.js';
import { Ticker } from './ticker.js';

export interface StepBenchOptions extends Omit<BuildOptions, 'vram' | 'ram'> {
  tokens: readonly number[];
  /** All that a case has but its length. */
  shared: Omit<StepCase, 'tokens'>;
  /** Find the longest length that fits, and probe it. */
  search?: boolean | undefined;
  /** Probe nothing longer. */
  most?: number | undefined;
  compare?: Optimization | undefined;
  /** Pairs of `compare`. Default: 3 to 9, by how long one takes. */
  rounds?: number | undefined;
  /** A second chunk size, whose loss and gradients must agree. */
  checkChunk?: number | undefined;
}

interface BuildOptions extends OutputOptions {
  model: string;
  layers?: number | undefined;
  vram?: number | undefined;
  ram?: number | undefined;
  signal?: AbortSignal | undefined;
}

interface Bench extends Disposable {
  model: CausalLM;
  report: Report;
  io: StepIo;
  ticker: Ticker;
}

/** @throws ERR_LC_PLAN where the weights alone do not fit */
async function build(name: string, device: DeviceLike, o: BuildOptions): Promise<Bench> {
  const scope = new Scope();
  try {
    const report = newReport(name, device);
    const ticker: Ticker = scope.own(
      new Ticker(name, (text) => {
        report.environment.progress = text;
        if (ticker.log.length > 0) report.environment.log = ticker.log;
        save(report, o);
      }),
    );
    const from = performance.now();
    applyCaps(device, o);
    ticker.about(`making the weights of ${o.model}`);
    const model = scope.own(
      await syntheticModel(o.model, {
        ...{ device, loadIn4bit: true, lora: { r: 8, loraAlpha: 16, targetModules: ['q_proj', 'k_proj', 'v_proj', 'o_proj'] } },
        ...(o.layers === undefined ? {} : { layers: o.layers }),
      }),
    );
    randomizeLoraB(model);
    await defaultStream(device).sync();
    // A learning rate of 0 does all of AdamW's arithmetic and lets every run start from the same parameters.
    const optimizer = scope.own(new AdamW(model.parameters, { lr: 0 }));
    const trainable = model.parameters.reduce((sum, p) => sum + p.value.numel, 0);
    const flops = stepFlops(model.config, 1);
    Object.assign(report.environment, {
      ...{ model: o.model, layers: model.layers.length, trainable, weightBytes: deviceMemory(device).liveBytes },
      ...{ buildSeconds: (performance.now() - from) / 1000, linearGflopPerToken: flops.linear / 1e9, headGflopPerToken: flops.head / 1e9 },
    });
    report.notes.push(
      `${o.model}, ${model.layers.length} layers, random weights (${gibibytes(deviceMemory(device).liveBytes)} with optimizer), LoRA r 8 on q, k, v, o: ${count(trainable)} parameters. ` +
        `Work: 3 x ${(flops.linear / 1e9).toFixed(2)} GFLOP for the linears and ${(flops.head / 1e9).toFixed(2)} for the head per token, and 4.5 x attention forward (3.5 where its output is kept). ` +
        'The floor takes 750 TFLOP/s for the first two and 450 for attention; TFLOP/s counts the same work. ' +
        'AdamW runs with a learning rate of 0, so that every run starts from the same parameters. A warm-up of one chunk (of at most 16,384 tokens) comes first.',
    );
    const io: StepIo = {
      optimizer,
      onProgress: (text) => ticker.tell(text),
      onEnd: (text) => ticker.note(text),
      ...(o.signal ? { signal: o.signal } : {}),
    };
    return { model, report, io, ticker, [Symbol.dispose]: () => scope.dispose() };
  } catch (error) {
    scope.dispose();
    if (!isShort(error)) throw error;
    throw new LcError('ERR_LC_PLAN', `the weights of ${o.model} do not fit: ${error.message}`, { cause: error });
  }
}

/** @returns whether everything fitted */
export async function benchStep(device: DeviceLike, o: StepBenchOptions): Promise<{ report: Report; fits: boolean }> {
  using bench = await build('step', device, { ...o, vram: o.shared.vram, ram: o.shared.ram });
  const { model, report, io, ticker } = bench;
  const rows: Row[] = [];
  let fits = true;
  const add = (row: object): void => {
    rows.push(row as Row);
    save(report, o);
  };
  if (o.search) {
    report.tables.push(stepTable(rows, 'Longest lengths (memory probes: all layers reserved, two executed)'));
    ticker.about('search');
    const { maxTokens, plannedTokens, probe, refused } = await search(model, o.shared, io, {
      most: o.most,
      tell: (tokens) => ticker.about(`search: probe of ${count(tokens)} tokens`),
    });
    fits = maxTokens > 0;
    add({ ...(probe ?? { tokens: 0, name: '', fits: false, probe: true, reason: 'no length fits' }), maxTokens, plannedTokens, refused });
    return { report, fits };
  }
  if (o.compare) report.tables.push(compareTable(rows));
  else if (o.checkChunk !== undefined) report.tables.push(checkTable(rows));
  else report.tables.push(stepTable(rows), phaseTable(rows));
  for (const tokens of o.tokens) {
    const c: StepCase = { ...o.shared, tokens };
    ticker.about(`${count(tokens)} tokens`);
    let row: StepResult | CompareResult | (Awaited<ReturnType<typeof checkChunk>> & { fits: true });
    if (o.compare) row = await compare(model, c, o.compare, o.rounds, io);
    else if (o.checkChunk !== undefined) row = { ...(await checkChunk(model, c, o.checkChunk, io)), fits: true };
    else row = await runStep(model, c, io);
    fits &&= row.fits;
    if ('ops' in row) report.tables.push(opTable(row));
    if (o.compare) for (const warning of (row as CompareResult).warnings ?? []) report.notes.push(`${count(tokens)} tokens: ${warning}`);
    add(row);
  }
  return { report, fits };
}

export interface Table1Options extends BuildOptions {
  tokens: number;
  chunk?: number | undefined;
  tile?: number | undefined;
  lossChunk?: number | undefined;
  /** Which rows, 1 to 5. Default all. */
  rows?: readonly number[] | undefined;
  /** Search the longest lengths. */
  search: boolean;
  /** Probe nothing longer. */
  most?: number | undefined;
}

/** Names of the rows, each with one more optimization. */
export const table1Rows = ['none', 'chunked-ce', 'offload-ckpt', 'tiled-mlp', 'chunks'] as const;

/** Row by row one more optimization: none, + chunked-ce, + offload-ckpt, + tiled-mlp, + chunks. */
export async function benchTable1(device: DeviceLike, o: Table1Options): Promise<Report> {
  using bench = await build('table1', device, o);
  const { model, report, io, ticker } = bench;
  const rows: Row[] = [];
  report.tables.push(table1Table(rows, o.tokens));
  report.notes.push(
    `At ${count(o.tokens)} tokens whole steps; from + offload-ckpt on every checkpoint lies in host memory there. The longest lengths are memory probes: everything reserved for all layers, ` +
      'two layers (a windowed and a full one, where the model has them) executed; there, spare device memory holds checkpoints before host memory does. Attention outputs are not kept. ' +
      'Without chunked-ce: f32 logits of the whole sequence at once and an array of that size for their gradient are held, as in plain PyTorch; the loss is computed by our kernel.',
  );
  const { vram, ram, chunk, tile, lossChunk } = o;
  for (const number of o.rows ?? [1, 2, 3, 4, 5]) {
    const without = optimizations.slice(number - 1);
    const name = table1Rows[number - 1] as string;
    const label = number === 1 ? name : `+ ${name}`;
    const shared = { ...{ without, vram, ram, chunk, tile, lossChunk }, keep: 0 } satisfies Omit<StepCase, 'tokens'>;
    const row: Row = { label, without };
    rows.push(row);
    ticker.about(`${label}, ${count(o.tokens)} tokens`);
    row.step = await runStep(model, { ...shared, tokens: o.tokens, host: !without.includes('offload') }, io);
    save(report, o);
    if (!o.search) continue;
    ticker.about(`${label}, longest`);
    row.longest = await search(model, shared, io, {
      most: o.most,
      tell: (tokens) => ticker.about(`${label}, longest: probe of ${count(tokens)} tokens`),
    });
    save(report, o);
  }
  return report;
}
