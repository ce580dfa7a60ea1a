/** `lc bench` on the CPU, with a tiny model of gpt-oss's form: the whole command, in this process. */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { deviceMemory, devices } from '@lc/tensor';
import { openSafetensors } from '@lc/tensor/safetensors';
import { expectNoLeaks } from '@lc/tensor/testing';
import { afterAll, afterEach, describe, expect, it, vi } from 'vitest';
import { chooseKernels } from '../src/bench/kernels.js';
import { Sweeps } from '../src/bench/step-run.js';
import { Ticker } from '../src/bench/ticker.js';
import { program, runProgram } from '../src/cli/program.js';

expectNoLeaks();

const dir = mkdtempSync(join(tmpdir(), 'lc-bench-'));
afterAll(() => rmSync(dir, { recursive: true, force: true }));
afterEach(() => {
  process.exitCode = undefined;
});

interface Run {
  code: number;
  out: string;
  err: string;
}
async function lc(...argv: string[]): Promise<Run> {
  const text = { out: '', err: '' };
  const into = (key: 'out' | 'err') => (chunk: string | Uint8Array) => {
    text[key] += String(chunk);
    return true;
  };
  const spies = [
    vi.spyOn(process.stdout, 'write').mockImplementation(into('out')),
    vi.spyOn(process.stderr, 'write').mockImplementation(into('err')),
  ];
  try {
    return { code: await runProgram(program(), argv), ...text };
  } finally {
    for (const spy of spies) spy.mockRestore();
    process.exitCode = undefined;
  }
}
type Row = Record<string, unknown> & { tokens: number; fits: boolean };
interface Report {
  bench: string;
  done: boolean;
  environment: Record<string, unknown>;
  tables: { rows: Row[] }[];
}
const tiny = ['--model', 'tiny-gpt-oss', '--device', 'cpu'];
async function rowOf(what: string, ...argv: string[]): Promise<Row> {
  const { code, out, err } = await lc('bench', what, ...tiny, ...argv, '--json');
  expect(err.replace(/\[lc bench.*\n/g, '')).toBe('');
  expect(code).toBe(0);
  return rowsOf(out)[0] as Row;
}
function rowsOf(out: string): Row[] {
  const [table] = (JSON.parse(out) as Report).tables;
  if (!table) throw new Error('no table');
  return table.rows;
}

describe('lc bench step', () => {
  it('prints what a step took, for several lengths in one process', async () => {
    const { code, out, err } = await lc('bench', 'step', ...tiny, '--tokens', '300,512', '--chunk', '128');
    expect(code).toBe(0);
    expect(out).toMatch(/\| 300 \| all \| 128 \//);
    expect(out).toMatch(/\| 512 \| all \|/);
    expect(out).toMatch(/LoRA r 8 on q, k, v, o: 20,480 parameters/);
    expect(err).toMatch(/\[lc bench step, \d+\.\d s\] 512 tokens/);
  });

  it('measures time by phase, memory, work, and writes the same to a file', async () => {
    const file = join(dir, 'step.json');
    const row = await rowOf('step', '--tokens', '512', '--chunk', '128', '--host', '--keep', '0', '--out', file);
    const { seconds, phases, hostBytes, vram, loss, gradNorm, dequantization, layers } = row as unknown as {
      seconds: number;
      phases: Record<string, number>;
      hostBytes: { checkpoints: number; peak: number };
      vram: { allocatorPeakBytes: number; byLabel: Record<string, number> };
      loss: number;
      gradNorm: number;
      dequantization: { passes: number; layerMs: number };
      layers: number;
    };
    const sum = Object.values(phases).reduce((a, b) => a + b, 0);
    expect(sum).toBeGreaterThan(0.5 * seconds);
    expect(sum).toBeLessThanOrEqual(1.01 * seconds);
    expect(Object.keys(phases).sort()).toEqual(['backward', 'clip and AdamW', 'fill', 'forward', 'input', 'loss', 'open']);
    expect(hostBytes.checkpoints).toBe(4 * 512 * 64 * 4); // layers x tokens x width x f32
    expect(hostBytes.peak).toBe(hostBytes.checkpoints);
    expect(vram.byLabel.workspace).toBeGreaterThan(0);
    expect(layers).toBe(4);
    expect(dequantization.passes).toBe(8); // forward and backward of four layers
    expect(loss).toBeCloseTo(Math.log(512), 0);
    expect(gradNorm).toBeGreaterThan(0);
    const saved = JSON.parse(readFileSync(file, 'utf8')) as Report;
    expect(saved.done).toBe(true);
    expect(saved.tables[0]?.rows[0]?.loss).toBe(loss);
    expect(saved.environment.trainable).toBe(20480);
  });

  it('does without each optimization, with the same loss', async () => {
    const losses: number[] = [];
    const peaks: Record<string, number> = {};
    for (const without of ['none', 'chunked-ce', 'offload', 'tiled-mlp', 'chunks', 'chunked-ce,offload,tiled-mlp,chunks']) {
      const sizes = ['--chunk', '128', '--tile', '32', '--loss-chunk', '32', '--keep', '0'];
      const row = await rowOf('step', '--tokens', '512', '--without', without, ...sizes, '--host');
      losses.push(row.loss as number);
      peaks[without] = (row.vram as { allocatorPeakBytes: number }).allocatorPeakBytes;
      const want = { chunk: /chunks/.test(without) ? 512 : 128, tile: 32, lossChunk: 32 };
      if (/tiled/.test(without)) want.tile = want.chunk;
      if (/chunked-ce/.test(without)) want.lossChunk = want.chunk;
      expect(row).toMatchObject(want);
      const label = (row.vram as { byLabel: Record<string, number> }).byLabel['whole logits'] ?? 0;
      expect(label).toBe(/chunked-ce/.test(without) ? 4 * 512 * (2 * 512 - want.chunk) : 0);
      expect((row.hostBytes as { checkpoints: number }).checkpoints).toBe(/offload/.test(without) ? 0 : 4 * 512 * 64 * 4);
    }
    for (const loss of losses) expect(Math.abs(loss - (losses[0] as number))).toBeLessThan(1e-5);
    const all = peaks['chunked-ce,offload,tiled-mlp,chunks'] as number;
    expect(Math.max(...Object.values(peaks))).toBe(all);
    expect(peaks.none).toBe(Math.min(...Object.values(peaks)));
  });

  it('says what does not fit and which budget, with exit code 3, and goes on', async () => {
    const { code, out } = await lc('bench', 'step', ...tiny, '--tokens', '100000,300', '--vram', '8MiB', '--json');
    expect(code).toBe(3);
    const [long, short] = rowsOf(out) as [Row, Row];
    expect(long.fits).toBe(false);
    expect(long.reason).toMatch(/RAM.*The longest length that fits: \d+/);
    expect(short.fits).toBe(true);
    const whole = await lc('bench', 'step', ...tiny, '--tokens', '100000', '--vram', '8MiB', '--without', 'chunked-ce');
    expect(whole.code).toBe(3);
    expect(whole.out).toMatch(/does not fit/);
  });

  it('probes a length: all layers reserved, two executed', async () => {
    const whole = await rowOf('step', '--tokens', '1024', '--chunk', '256', '--host', '--keep', '0');
    const probe = await rowOf('step', '--tokens', '1024', '--chunk', '256', '--host', '--keep', '0', '--probe');
    expect(probe).toMatchObject({ probe: true, layers: 2 });
    expect(probe.vram).toEqual(whole.vram);
    expect(probe.hostBytes).toEqual(whole.hostBytes);
    const segments = await rowOf('step', '--tokens', '1024', '--chunk', '256', '--host', '--layers-per-segment', '2', '--probe');
    expect(segments).toMatchObject({ probe: true, layers: 2, layersPerSegment: 2, kept: 2, keptTokens: 1024 });
    expect(segments.dequantization).toMatchObject({ passes: 4 }); // one segment, whose inputs still lie there
  });

  it('says when a layer has ended, so that a run that is cut off tells how far it got', () => {
    let now = 1000;
    const clock = vi.spyOn(performance, 'now').mockImplementation(() => now);
    const ends: [string, number, number][] = [];
    const sweeps = new Sweeps((...end) => ends.push(end));
    for (const [phase, layer, last] of [
      ['input', -1, false],
      ['forward', 0, false],
      ['forward', 0, false],
      ['forward', 1, false],
      ['forward', 1, true],
      ['loss', -1, true],
      ['fill', 1, false],
      ['backward', 1, false],
      ['fill', 0, false],
      ['backward', 0, true],
    ] as const) {
      now += 2000; // each call takes two seconds
      sweeps.at(phase, layer, last);
    }
    clock.mockRestore();
    expect(ends).toEqual([
      ['input', 2, 2],
      ['forward, layer 0', 4, 6],
      ['forward, layer 1', 4, 10],
      ['loss', 2, 12],
      ['fill, layer 1', 2, 14],
      ['backward, layer 1', 2, 16],
      ['fill, layer 0', 2, 18],
      ['backward, layer 0', 2, 20],
    ]);
    const ticked: string[] = [];
    const spy = vi.spyOn(process.stderr, 'write').mockReturnValue(true);
    using ticker = new Ticker('step', (text) => ticked.push(text));
    ticker.about('1,000 tokens');
    ticker.note('forward, layer 0 done in 2.0 s');
    const lines = spy.mock.calls.map(([line]) => line);
    spy.mockRestore();
    expect(lines.at(-1)).toMatch(/^\[lc bench step, \d+\.\d s\] 1,000 tokens: forward, layer 0 done in 2\.0 s\n$/);
    expect(ticked.at(-1)).toBe('1,000 tokens: forward, layer 0 done in 2.0 s');
    expect(ticker.log).toEqual([expect.stringMatching(/^\d+\.\d s: 1,000 tokens: forward, layer 0 done in 2\.0 s$/)]);
  });

  it('searches the longest length that fits', async () => {
    const row = await rowOf('step', '--probe', '--search', '--vram', '12MiB', '--ram', '4MiB', '--chunk', '128', '--loss-chunk', '64');
    expect(row).toMatchObject({ probe: true, fits: true });
    const longest = row.maxTokens as number;
    expect(row.tokens).toBe(longest);
    const budget = ['--vram', '12MiB', '--ram', '4MiB', '--chunk', '128', '--loss-chunk', '64'];
    const capped = await rowOf('step', '--probe', '--search', '--most', '1000', ...budget);
    expect(capped).toMatchObject({ tokens: 1000, maxTokens: 1000, plannedTokens: longest });
    const { code } = await lc('bench', 'step', ...tiny, '--tokens', String(longest + 512), ...budget);
    expect(code).toBe(3);
  });

  it.each(['offload', 'tiled-mlp', 'chunked-ce', 'chunks'])('runs pairs with and without %s', async (what) => {
    const row = await rowOf('step', '--tokens', '300', '--chunk', '128', '--tile', '64', '--compare', what, '--rounds', '2');
    expect(row).toMatchObject({ what, fits: true });
    expect(row.withSeconds).toHaveLength(2);
    expect(row.withoutSeconds).toHaveLength(2);
    const [least, most] = row.spread as [number, number];
    expect(row.overhead).toBeGreaterThanOrEqual(least);
    expect(row.overhead).toBeLessThanOrEqual(most);
  });

  it('times every op of another step', async () => {
    const { code, out } = await lc('bench', 'step', ...tiny, '--tokens', '300', '--chunk', '128', '--profile');
    expect(code).toBe(0);
    expect(out).toMatch(/Device time by op at 300 tokens: \d+\.\d+ s in [\d,]+ calls/);
    for (const op of [
      /\| attention forward, full \| \d+ \|/,
      /\| attention backward, window \d+ \|/,
      /\| groupedGemm \d+ x \d+ x \d+ \|/,
      /\| rmsNorm \|/,
    ])
      expect(out).toMatch(op);
  });

  it('holds loss and gradients against those of another chunk size', async () => {
    const row = await rowOf('step', '--tokens', '512', '--chunk', '256', '--check-chunk', '64');
    expect(row).toMatchObject({ chunks: [256, 64], parameters: 32 });
    expect(row.worstError).toBeGreaterThan(0); // B is not 0, so gradients reach every A
    expect(row.worstError).toBeLessThan(1e-4);
    const [a, b] = row.losses as [number, number];
    expect(Math.abs(a - b)).toBeLessThan(1e-5);
  });

  it('refuses bad options', async () => {
    for (const [argv, message] of [
      [['--without', 'magic'], /'magic' is none of chunked-ce, offload, tiled-mlp, chunks/],
      [['--tokens', '0'], /--tokens: expected a whole number/],
      [['--model', 'gpt-2'], /no preset 'gpt-2'; there are gpt-oss-20b/],
      [['--vram', 'much'], /--vram: expected bytes/],
      [['--search'], /give --probe as well/],
      [['--profile', '--compare', 'offload'], /--profile times the ops of plain steps/],
      [['--profile', '--check-chunk', '64'], /--profile times the ops of plain steps/],
      [['--device', 'tpu'], /expected cpu, cuda/],
      [['--compare', 'all'], /Allowed choices/],
    ] as const) {
      const { code, err } = await lc('bench', 'step', ...tiny, ...argv);
      expect(code).toBe(2);
      expect(err).toMatch(message);
    }
  });

  it('says what is missing where there is no GPU', async () => {
    if (devices().length > 1) return;
    const { code, err } = await lc('bench', 'step');
    expect(code).toBe(1);
    expect(err).toMatch(/ERR_LC_NO_(DRIVER|PREBUILD|DEVICE).*--device cpu/s);
  });
});

describe('lc bench table1', () => {
  it('has a row for each further optimization', async () => {
    const sizes = ['--chunk', '128', '--tile', '32', '--loss-chunk', '64'];
    const { code, out } = await lc('bench', 'table1', ...tiny, '--tokens', '1024', '--vram', '12MiB', '--ram', '6MiB', ...sizes, '--json');
    expect(code).toBe(0);
    const table = rowsOf(out) as unknown as { label: string; step: Row; longest: { maxTokens: number } }[];
    expect(table.map((row) => row.label)).toEqual(['none', '+ chunked-ce', '+ offload-ckpt', '+ tiled-mlp', '+ chunks']);
    const longest = table.map((row) => row.longest.maxTokens);
    for (let i = 1; i < 5; i++) expect(longest[i]).toBeGreaterThanOrEqual(longest[i - 1] as number);
    expect(longest[4]).toBeGreaterThan(2 * (longest[0] as number));
    const printed = await lc('bench', 'table1', ...tiny, '--tokens', '512', '--rows', '1,chunks', '--no-search');
    expect(printed.out).toMatch(/\| none \|/);
    expect(printed.out).toMatch(/\| \+ chunks \|/);
    expect(printed.out).not.toMatch(/\| \+ tiled-mlp \|/);
    const wrong = await lc('bench', 'table1', ...tiny, '--rows', 'chunk');
    expect(wrong.code).toBe(2);
    expect(wrong.err).toMatch(/--rows: expected numbers from 1 to 5 or none, chunked-ce, offload-ckpt, tiled-mlp, chunks, got 'chunk'/);
    expect(deviceMemory('host').liveBytes).toBe(0);
  });
});

describe('lc bench of kernels', () => {
  it('attention: cases by name; inputs and results in files', async () => {
    const { out } = await lc('bench', 'attention', '--device', 'cpu', '--cases', 'tiny-window', '--json');
    expect(rowsOf(out)).toMatchObject([
      { name: 'tiny-window', window: 32, forwardMs: expect.any(Number), backwardOfStream: expect.any(Number) },
    ]);
    expect((await lc('bench', 'attention', '--device', 'cpu', '--cases', 'no')).err).toMatch(/--cases: no case 'no'; there are tiny/);
    const folder = join(dir, 'errors');
    const files = rowsOf((await lc('bench', 'attention', '--device', 'cpu', '--errors', folder, '--json')).out).map(
      (row) => row.file as string,
    );
    expect(files).toHaveLength(16);
    for (const file of files) {
      using reader = await openSafetensors(join(folder, file));
      expect(reader.names).toEqual(expect.arrayContaining(['q', 'k', 'v', 'dout', 'out', 'lse', 'dq', 'dk', 'dv']));
    }
  });

  it.each(['attention', 'gemm', 'rows', 'dequant'])('%s', async (what) => {
    const { code, out } = await lc('bench', what, '--device', 'cpu', '--json');
    expect(code).toBe(0);
    const report = JSON.parse(out) as Report;
    expect(report).toMatchObject({ bench: what, dtype: 'f32', done: true });
    expect(report.tables[0]?.rows.length).toBeGreaterThan(1);
  });
  it.each([
    ['ce', ['--model', 'tiny-gpt-oss', '--tokens', '600']],
    ['mlp', ['--model', 'tiny-gpt-oss', '--tokens', '600']],
    ['offload', ['--bytes', '4MiB', '--chunk', '256', '--width', '64']],
  ] as const)('%s', async (what, argv) => {
    const { code, out } = await lc('bench', what, '--device', 'cpu', ...argv);
    expect(code).toBe(0);
    expect(out).toMatch(/^CPU, \d+ threads; f32; /);
    expect(out.split('\n').filter((line) => line.startsWith('|')).length).toBeGreaterThan(2);
  });
});

it('a choice of kernels ends where it was made, whatever stood before and however it ends', () => {
  process.env.LCTX_GEMM = 'hopper';
  delete process.env.LCTX_ATTENTION;
  try {
    expect(() => {
      using _ = chooseKernels({ LCTX_ATTENTION: 'portable', LCTX_GEMM: 'portable' });
      expect([process.env.LCTX_ATTENTION, process.env.LCTX_GEMM]).toEqual(['portable', 'portable']);
      throw new Error('a launch failed');
    }).toThrow('a launch failed');
    expect(process.env.LCTX_GEMM).toBe('hopper');
    expect('LCTX_ATTENTION' in process.env).toBe(false);
  } finally {
    delete process.env.LCTX_GEMM;
  }
});
