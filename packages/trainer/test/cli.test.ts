/** The real `lc` command, as a user runs it: exit codes, what is on stdout, signals, a full disk. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const cli = join(root, 'dist/cli.js');
const tiny = join(root, '../../examples/quickstart/tiny-gpt-oss');
let dir: string;

beforeAll(() => {
  const newest = (folder: string): number =>
    Math.max(...readdirSync(folder, { recursive: true, encoding: 'utf8' }).map((name) => statSync(join(folder, name)).mtimeMs));
  if (!existsSync(cli) || statSync(cli).mtimeMs < newest(join(root, 'src'))) {
    execFileSync(process.execPath, [join(root, '../../node_modules/tsup/dist/cli-default.js')], { cwd: root, stdio: 'inherit' });
  }
  dir = mkdtempSync(join(tmpdir(), 'lc-cli-'));
  const words = 'the whale and a ship of men went to sea in that cold month with no more light than stars'.split(' ');
  const text = Array.from({ length: 1500 }, (_, i) => words[(i * i + 7 * i) % words.length]).join(' ');
  writeFileSync(join(dir, 'data.txt'), text);
}, 120_000);
afterAll(() => rmSync(dir, { recursive: true, force: true }));

interface Event {
  schema: number;
  type: string;
  [field: string]: unknown;
}
interface Run {
  code: number | null;
  stdout: string;
  stderr: string;
}

function collect(child: ChildProcess, onLine?: (line: string, child: ChildProcess) => void): Promise<Run> {
  return new Promise((resolve, reject) => {
    let stdout = '';
    let stderr = '';
    let open = '';
    child.stdout?.setEncoding('utf8').on('data', (text: string) => {
      stdout += text;
      const lines = (open + text).split('\n');
      open = lines.pop() ?? '';
      for (const line of lines) onLine?.(line, child);
    });
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      stderr += text;
    });
    child.on('error', reject);
    child.on('close', (code) => resolve({ code, stdout, stderr }));
  });
}
const lc = (args: readonly string[], onLine?: (line: string, child: ChildProcess) => void): Promise<Run> =>
  collect(spawn(process.execPath, [cli, ...args], { cwd: dir, stdio: ['ignore', 'pipe', 'pipe'] }), onLine);
/** No file may grow beyond `kib`: what a write meets on a full disk, for one process alone. */
const lcWithFileLimit = (kib: number, args: readonly string[]): Promise<Run> =>
  collect(
    spawn('bash', ['-c', `ulimit -f ${kib}; exec "$@"`, 'bash', process.execPath, cli, ...args], {
      cwd: dir,
      stdio: ['ignore', 'pipe', 'pipe'],
    }),
  );
const events = ({ stdout }: Run): Event[] =>
  stdout
    .trim()
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as Event);
const errorOf = (run: Run): { code: string; message: string } =>
  events(run).find((e) => e.type === 'error')?.error as { code: string; message: string };

/** Writes a config; its outputs go to the folder `<name>`. */
function config(name: string, more: Record<string, string | number> = {}): string {
  const keys: Record<string, string | number> = {
    base_model: tiny,
    output_dir: `./${name}`,
    sequence_len: 128,
    excess_length_strategy: 'split',
    lora_r: 4,
    chunk_size: 64,
    tile_size: 64,
    loss_chunk_size: 32,
    max_steps: 2,
    learning_rate: 1e-2,
    ...more,
  };
  const file = join(dir, `${name}.yaml`);
  const lines = Object.entries(keys).map(([key, value]) => `${key}: ${value}`);
  writeFileSync(file, `datasets:\n  - path: ./data.txt\n${lines.join('\n')}\n`);
  return file;
}
const adapterBytes = (name: string): Buffer => readFileSync(join(dir, name, 'adapter_model.safetensors'));
/** Every file of a run and its content, but for the log, which only grows, and the config of the last start. */
function contents(folder: string): Map<string, string> {
  const files = readdirSync(folder, { recursive: true, encoding: 'utf8' }).filter((name) => statSync(join(folder, name)).isFile());
  const kept = files.filter((name) => !['metrics.jsonl', 'config.resolved.json'].includes(name)).sort();
  return new Map(kept.map((name) => [name, readFileSync(join(folder, name)).toString('base64')]));
}

describe('lc train', () => {
  it('writes only NDJSON to stdout, exits with 0, and leaves an adapter that generate loads', async () => {
    const run = await lc(['train', config('plain', { val_set_size: 1, eval_steps: 1, save_steps: 1 }), '--json']);
    expect(run).toMatchObject({ code: 0 });
    const all = events(run);
    for (const event of all) {
      expect(event.schema).toBe(1);
      expect(Date.parse(event.time as string)).not.toBeNaN();
    }
    const types = all.map((e) => e.type);
    expect(new Set(types)).toEqual(new Set(['warning', 'plan', 'progress', 'step', 'eval', 'save', 'end']));
    expect(types.filter((t) => t === 'step')).toHaveLength(2);
    expect(types.at(-1)).toBe('end');
    expect(all.at(-1)).toMatchObject({ reason: 'finished', step: 2, adapter: join(dir, 'plain') });
    expect(run.stderr).toMatch(/step 2\/2 .*loss \d/);
    expect(readdirSync(join(dir, 'plain')).sort()).toEqual(
      expect.arrayContaining(['adapter_config.json', 'adapter_model.safetensors', 'checkpoint-1', 'config.resolved.json', 'metrics.jsonl']),
    );

    const generate = async (...args: string[]): Promise<string> => {
      const out = await lc(['generate', tiny, 'The whale', '--max-new-tokens', '6', '--json', ...args]);
      expect(out).toMatchObject({ code: 0 });
      const [answer] = events(out);
      expect(answer).toMatchObject({ schema: 1, prompt: 'The whale' });
      return answer?.text as string;
    };
    const adapter = ['--adapter', join(dir, 'plain')];
    const sampled = ['--temperature', '1', '--seed', '3'];
    const [base, again, tuned, tunedAgain, random, randomAgain] = await Promise.all([
      generate(),
      generate(),
      generate(...adapter),
      generate(...adapter),
      generate(...sampled),
      generate(...sampled),
    ]);
    expect(again).toBe(base);
    expect(tunedAgain).toBe(tuned);
    expect(randomAgain).toBe(random);
  });

  it('--set overrides the file, --dry-run shows the plan and writes nothing', async () => {
    const run = await lc(['train', config('dry'), '--dry-run', '--json', '--set', 'max_steps=7', '--set', 'sequence_len=96']);
    expect(run).toMatchObject({ code: 0 });
    const plan = events(run).find((e) => e.type === 'plan');
    expect(plan).toMatchObject({ totalSteps: 7, tokens: 96, chunk: 64, device: 'cpu' });
    expect(events(run).some((e) => e.type === 'step')).toBe(false);
    expect(run.stderr).toMatch(/plan/);
    expect(run.stderr).toMatch(/% supervised/);
    expect(existsSync(join(dir, 'dry'))).toBe(false);
  });

  it('bad input: exit code 2, a typed error on stdout, its text on stderr, nothing written', async () => {
    const cases: [name: string, more: Record<string, string | number>, args: string[], code: RegExp, message: RegExp][] = [
      [
        'unknown',
        { lerning_rate: 1 },
        [],
        /^ERR_LC_CONFIG$/,
        /unknown\.yaml:\d+: unknown key 'lerning_rate'; did you mean 'learning_rate'\?/,
      ],
      ['set', {}, ['--set', 'lora_r=none'], /^ERR_LC_CONFIG$/, /--set: lora_r/],
      ['nomodel', { base_model: './not-there' }, [], /^ERR_LC_MODEL$/, /not-there: no such folder/],
      ['nodata', {}, ['--set', 'datasets.0.path=gone.txt'], /^ERR_LC_DATA$/, /gone\.txt/],
      ['noresume', {}, ['--resume'], /^ERR_LC_DATA$/, /no complete checkpoint/],
      ['target', { lora_target_modules: '[query]' }, [], /^ERR_LC_ADAPTER$/, /'query'/],
    ];
    for (const [name, more, args, code, message] of cases) {
      const run = await lc(['train', config(name, more), '--json', ...args]);
      expect(run).toMatchObject({ code: 2 });
      expect(errorOf(run).code).toMatch(code);
      expect(errorOf(run).message).toMatch(message);
      expect(run.stderr).toContain(errorOf(run).code);
      expect(existsSync(join(dir, name, 'adapter_model.safetensors'))).toBe(false);
    }
    const line = readFileSync(join(dir, 'unknown.yaml'), 'utf8').split('\n').indexOf('lerning_rate: 1') + 1;
    expect((await lc(['train', join(dir, 'unknown.yaml')])).stderr).toContain(`unknown.yaml:${line}:`);
  });

  it('does not fall back to the CPU when a GPU is asked for', async (context) => {
    const doctor = events(await lc(['doctor', '--json']))[0] as Event & { cuda: { available: boolean } };
    if (doctor.cuda.available) context.skip();
    const run = await lc(['train', config('gpu', { device: 'cuda' }), '--json']);
    expect(run.code).toBe(1);
    expect(errorOf(run).code).toMatch(/^ERR_LC_NO_(DRIVER|PREBUILD|DEVICE)$/);
    expect(events(run).some((e) => e.type === 'plan' || e.type === 'step')).toBe(false);
    expect(existsSync(join(dir, 'gpu'))).toBe(false);
  });

  it.each([
    ['SIGINT', 130, 'progress'],
    ['SIGTERM', 143, 'step'],
  ] as const)('%s: exits with %i, and --resume ends with the same adapter, bit for bit', async (signal, code, on) => {
    const total = 10;
    const more = { max_steps: total, lora_dropout: 0.1, gradient_accumulation_steps: 2, lr_scheduler: 'cosine' };
    const whole = `whole-${signal}`;
    const cut = `cut-${signal}`;
    const uninterrupted = lc(['train', config(whole, more), '--json']);
    let sent = false;
    const stopped = await lc(['train', config(cut, more), '--json'], (line, child) => {
      const event = JSON.parse(line) as Event;
      if (sent || event.type !== on || (event.step as number) < 3) return;
      sent = true;
      child.kill(signal);
    });
    expect(await uninterrupted).toMatchObject({ code: 0 });
    expect(stopped).toMatchObject({ code });
    expect(stopped.stderr).toContain(`${signal}: stopping after this chunk and saving`);
    const end = events(stopped).at(-1);
    expect(end).toMatchObject({ type: 'end', reason: 'aborted' });
    const step = end?.step as number;
    expect(step).toBeGreaterThanOrEqual(2);
    expect(step).toBeLessThan(total);
    expect(existsSync(join(dir, cut, `checkpoint-${step}/COMPLETE`))).toBe(true);
    // The adapter so far is the checkpoint's.
    expect(adapterBytes(cut).equals(readFileSync(join(dir, cut, `checkpoint-${step}/adapter_model.safetensors`)))).toBe(true);
    expect(adapterBytes(cut).equals(adapterBytes(whole))).toBe(false);

    const resumed = await lc(['train', join(dir, `${cut}.yaml`), '--json', '--resume']);
    expect(resumed).toMatchObject({ code: 0 });
    const steps = events(resumed).filter((e) => e.type === 'step');
    expect(steps.map((e) => e.step)).toEqual(Array.from({ length: total - step }, (_, i) => step + 1 + i));
    expect(adapterBytes(cut).equals(adapterBytes(whole))).toBe(true);
  });

  it('a full disk: ERR_LC_IO, exit code 1, and all that was written before is as it was', async () => {
    const file = config('full', { save_steps: 1, lora_r: 16 });
    expect(await lc(['train', file, '--json'])).toMatchObject({ code: 0 });
    const folder = join(dir, 'full');
    const before = contents(folder);
    const first = join(folder, 'checkpoint-1');
    const adapterKib = statSync(join(first, 'adapter_model.safetensors')).size >> 10;
    const optimizerKib = statSync(join(first, 'optimizer.safetensors')).size >> 10;
    expect(adapterKib).toBeGreaterThan(32); // so that the log and the small files still fit
    const cases: [kib: number, args: string[], message: RegExp][] = [
      // The adapter of checkpoint-2 fits, its optimizer does not.
      [optimizerKib - 4, [], /checkpoint-2/],
      // No checkpoint, and the adapter at the end does not fit.
      [adapterKib - 4, ['--set', 'save_steps=100'], /adapter_model/],
    ];
    for (const [kib, args, message] of cases) {
      const run = await lcWithFileLimit(kib, ['train', file, '--json', '--resume', first, ...args]);
      expect(run).toMatchObject({ code: 1 });
      expect(errorOf(run)).toMatchObject({ code: 'ERR_LC_IO', message: expect.stringMatching(message) });
      expect(errorOf(run).message).toMatch(/EFBIG|too large/i);
      expect(contents(folder)).toEqual(before);
    }
    expect(await lc(['train', file, '--json', '--resume', first])).toMatchObject({ code: 0 });
    expect(contents(folder)).toEqual(before);
  });
});

describe('lc plan, doctor, generate', () => {
  it('plan: JSON on stdout, exit code 3 when it does not fit', async () => {
    const [fits, not] = await Promise.all([
      lc(['plan', tiny, '--tokens', '4096', '--json', '--vram', '2GiB', '--ram', '2GiB']),
      lc(['plan', join(tiny, 'config.json'), '--tokens', '1000000', '--json', '--vram', '64MiB', '--ram', '64MiB']),
    ]);
    expect(fits).toMatchObject({ code: 0 });
    expect(events(fits)).toEqual([expect.objectContaining({ schema: 1, tokens: 4096, fits: true, reasons: [] })]);
    expect(not).toMatchObject({ code: 3 });
    expect(events(not)[0]).toMatchObject({ schema: 1, tokens: 1_000_000, fits: false, reasons: [expect.stringMatching(/GiB/)] });
  });

  it('train: exit code 3 when the run does not fit', async () => {
    const run = await lc([
      'train',
      config('huge', { sequence_len: 500_000_000, chunk_size: 65536, rope_scaling: '{ rope_type: yarn, factor: 1000000 }' }),
      '--json',
    ]);
    expect(run).toMatchObject({ code: 3 });
    expect(errorOf(run)).toMatchObject({ code: 'ERR_LC_PLAN', message: expect.stringMatching(/longest length that fits/) });
    expect(existsSync(join(dir, 'huge', 'adapter_model.safetensors'))).toBe(false);
  });

  it('doctor: one JSON object that tells the machine', async () => {
    const run = await lc(['doctor', '--json']);
    expect(run).toMatchObject({ code: 0, stderr: '' });
    expect(events(run)).toEqual([
      expect.objectContaining({
        schema: 1,
        node: process.version,
        gpus: expect.any(Array),
        ram: expect.any(Object),
        cuda: expect.any(Object),
      }),
    ]);
    const text = await lc(['doctor']);
    expect(text).toMatchObject({ code: 0, stdout: expect.stringMatching(/RAM .* available of/) });
  });

  it('usage errors and missing inputs: exit code 2', async () => {
    const empty = join(dir, 'empty-model');
    mkdirSync(empty);
    const cases: [args: string[], text: RegExp][] = [
      [[], /Usage: lc/],
      [['trian'], /unknown command 'trian'/],
      [['train'], /missing required argument/],
      [['train', 'no.yaml'], /ERR_LC_CONFIG: .*no\.yaml/],
      [['train', config('flag'), '--dryrun'], /unknown option '--dryrun'/],
      [['plan', tiny], /required option '--tokens/],
      [['plan', tiny, '--tokens', 'many'], /ERR_LC_CONFIG: --tokens/],
      [['plan', join(dir, 'nowhere'), '--tokens', '10'], /ERR_LC_MODEL: .*nowhere/],
      [['generate', join(dir, 'nowhere'), 'a'], /ERR_LC_MODEL: .*nowhere/],
      [['generate', empty, 'a'], /ERR_LC_(MODEL|TOKENIZER): /],
      [['generate', tiny, 'a', '--adapter', empty], /ERR_LC_ADAPTER: /],
      [['generate', tiny, 'a', '--top-p', '2'], /ERR_LC_CONFIG: --top-p/],
    ];
    for (const [args, text] of cases) {
      const run = await lc(args);
      expect({ args, code: run.code, text: run.stderr }).toMatchObject({ args, code: 2, text: expect.stringMatching(text) });
      expect(run.stdout).toBe('');
    }
    const version = await lc(['--version']);
    expect(version).toMatchObject({ code: 0, stdout: expect.stringMatching(/^\d+\.\d+\.\d+/) });
  });
});
