/** `lc bench ...` */
import { presets } from '@lc/models';
import { LcError } from '@lc/tensor';
import { type Command, Option } from 'commander';
import { benchAttention } from '../bench/attention.js';
import { benchAttentionErrors } from '../bench/attention-errors.js';
import { benchCe } from '../bench/ce.js';
import { benchDequant } from '../bench/dequant.js';
import { benchGemm } from '../bench/gemm.js';
import { benchMlp } from '../bench/mlp.js';
import { benchOffload } from '../bench/offload.js';
import { benchDevice, finish, type OutputOptions, type Report } from '../bench/report.js';
import { benchRows } from '../bench/rows.js';
import { benchStep, benchTable1, table1Rows } from '../bench/step.js';
import { type Optimization, optimizations, parseWithout } from '../bench/step-case.js';
import { parseBytes, wholeNumber } from './exit.js';

interface Common extends OutputOptions {
  device: string;
}

const count = (name: string, text: string | undefined): number | undefined => (text === undefined ? undefined : wholeNumber(name, text, 1));
const bytes = (name: string, text: string | undefined): number | undefined => (text === undefined ? undefined : parseBytes(name, text));
const list = (name: string, text: string): number[] => text.split(',').map((part) => wholeNumber(name, part.trim(), 1));

function modelOf(name: string): string {
  if (!Object.hasOwn(presets, name))
    throw new LcError('ERR_LC_CONFIG', `--model: no preset '${name}'; there are ${Object.keys(presets).join(', ')}`);
  return name;
}

interface StepFlags extends Common {
  model: string;
  layers?: string;
  tokens: string;
  chunk?: string;
  tile?: string;
  lossChunk?: string;
  layersPerSegment?: string;
  keep?: string;
  vram?: string;
  ram?: string;
  without?: string;
  host?: boolean;
  deterministic: boolean;
  profile?: boolean;
  probe?: boolean;
  search: boolean;
  compare?: Optimization;
  rounds?: string;
  checkChunk?: string;
  rows?: string;
  most?: string;
}

async function stepCommand(flags: StepFlags): Promise<void> {
  const device = benchDevice(flags.device);
  const auto = (name: string, text: string | undefined): number | 'auto' | undefined =>
    text === 'auto' ? 'auto' : text === undefined ? undefined : wholeNumber(name, text);
  if (flags.search && !flags.probe) throw new LcError('ERR_LC_CONFIG', '--search finds lengths by memory probes: give --probe as well');
  if (flags.profile && (flags.search || flags.compare || flags.checkChunk))
    throw new LcError('ERR_LC_CONFIG', '--profile times the ops of plain steps: leave out --search, --compare and --check-chunk');
  const { report, fits } = await benchStep(device, {
    ...{ model: modelOf(flags.model), layers: count('--layers', flags.layers), tokens: list('--tokens', flags.tokens) },
    shared: {
      without: parseWithout(flags.without),
      chunk: count('--chunk', flags.chunk),
      tile: count('--tile', flags.tile),
      lossChunk: count('--loss-chunk', flags.lossChunk),
      layersPerSegment: auto('--layers-per-segment', flags.layersPerSegment),
      keep: auto('--keep', flags.keep),
      vram: bytes('--vram', flags.vram),
      ram: bytes('--ram', flags.ram),
      host: flags.host,
      nondeterministic: !flags.deterministic,
      profileOps: flags.profile,
      probe: flags.probe,
    },
    search: flags.search,
    most: count('--most', flags.most),
    compare: flags.compare,
    rounds: count('--rounds', flags.rounds),
    checkChunk: count('--check-chunk', flags.checkChunk),
    ...{ json: flags.json, out: flags.out },
  });
  finish(report, flags);
  if (!fits) process.exitCode = 3;
}

/** A row of table 1 by number or name. */
function rowOf(text: string): number {
  const named = (table1Rows as readonly string[]).indexOf(text) + 1;
  if (named > 0 || /^[1-5]$/.test(text)) return named || Number(text);
  throw new LcError('ERR_LC_CONFIG', `--rows: expected numbers from 1 to 5 or ${table1Rows.join(', ')}, got '${text}'`);
}

async function table1Command(flags: StepFlags): Promise<void> {
  const device = benchDevice(flags.device);
  const rows = flags.rows?.split(',').map((part) => rowOf(part.trim()));
  const report = await benchTable1(device, {
    ...{ model: modelOf(flags.model), layers: count('--layers', flags.layers), tokens: wholeNumber('--tokens', flags.tokens, 1), rows },
    ...{ chunk: count('--chunk', flags.chunk), tile: count('--tile', flags.tile), lossChunk: count('--loss-chunk', flags.lossChunk) },
    ...{ vram: bytes('--vram', flags.vram), ram: bytes('--ram', flags.ram), search: flags.search, most: count('--most', flags.most) },
    ...{ json: flags.json, out: flags.out },
  });
  finish(report, flags);
}

/** Adds `bench` and what it can measure. */
export function addBench(lc: Command): void {
  const bench = lc.command('bench').description('measure kernels and whole steps on this machine; random data, nothing is read from disk');
  const command = (name: string, description: string): Command =>
    bench
      .command(name)
      .description(description)
      .option('--device <device>', 'cuda, cuda:N, or cpu to try it', 'cuda')
      .option('--json', 'one JSON object on stdout')
      .option('--out <file>', 'write the JSON there, also while it runs');
  const simple = (name: string, description: string, run: (device: ReturnType<typeof benchDevice>) => Promise<Report>): void => {
    command(name, description).action(async (flags: Common) => finish(await run(benchDevice(flags.device)), flags));
  };
  const sized = (name: string, description: string, tokens: number): Command =>
    command(name, description)
      .option('--model <preset>', Object.keys(presets).join(', '), 'gpt-oss-20b')
      .option('--tokens <n>', 'rows', String(tokens));

  command('attention', 'attention forward and backward, causal TFLOP/s')
    .option('--cases <list>', 'shapes by name: 16k, 64k, 256k, chunk, 32k-after-512k, window-256k, d128-16k, ...; a wrong name lists all')
    .option('--errors <folder>', 'no times: writes inputs and results there, for peers/attention.py --errors to hold against f64')
    .action(async (flags: Common & { cases?: string; errors?: string }) => {
      const device = benchDevice(flags.device);
      const cases = flags.cases?.split(',').map((name) => name.trim());
      finish(flags.errors ? await benchAttentionErrors(device, flags.errors) : await benchAttention(device, { cases }), flags);
    });
  simple('gemm', 'matrix products of gpt-oss beside cuBLASLt', benchGemm);
  simple('rows', 'row ops beside a copy; low-rank, f32 and grouped products', benchRows);
  simple('dequant', 'NF4 and MXFP4 to the compute dtype beside a copy', benchDequant);
  sized('ce', 'LM head and cross-entropy beside its matrix products', 8192).action(async (flags: StepFlags) =>
    finish(
      await benchCe(benchDevice(flags.device), { model: modelOf(flags.model), tokens: wholeNumber('--tokens', flags.tokens, 1) }),
      flags,
    ),
  );
  sized('mlp', "a layer's MLP by tile size beside the untiled one", 32768).action(async (flags: StepFlags) =>
    finish(
      await benchMlp(benchDevice(flags.device), { model: modelOf(flags.model), tokens: wholeNumber('--tokens', flags.tokens, 1) }),
      flags,
    ),
  );
  command('offload', 'copies between device and host, bare and through the activation store')
    .option('--bytes <bytes>', 'moved each way', '1GiB')
    .option('--chunk <n>', 'tokens of a chunk', '8192')
    .option('--width <n>', 'elements of a token', '2880')
    .action(async (flags: Common & { bytes: string; chunk: string; width: string }) => {
      const device = benchDevice(flags.device);
      const size = { chunk: wholeNumber('--chunk', flags.chunk, 1), width: wholeNumber('--width', flags.width, 1) };
      finish(await benchOffload(device, { bytes: parseBytes('--bytes', flags.bytes), ...size }), flags);
    });

  const model = (name: string, description: string, tokens: string): Command =>
    command(name, description)
      .option('--model <preset>', Object.keys(presets).join(', '), 'gpt-oss-20b')
      .option('--synthetic', 'random weights of the real dimensions in the real formats (always so)')
      .option('--layers <n>', 'fewer layers than the model has')
      .option('--tokens <n>', tokens, '32768')
      .option('--vram <bytes>', 'cap of device memory, context included, e.g. 24GiB; default what is free')
      .option('--ram <bytes>', 'cap of host memory; default what is free')
      .option('--chunk <n>', 'tokens of a chunk; default from the plan')
      .option('--tile <n>', 'tokens of an MLP tile; default from the plan')
      .option('--loss-chunk <n>', 'rows of logits alive at once; default from the plan')
      .option('--most <n>', 'searches probe nothing longer than this');
  model('step', 'one training step: time by phase, memory, ratio to the floor', 'sequence length, or several: 32768,81920')
    .option('--layers-per-segment <n>', "a gradient checkpoint every n layers, or 'auto'")
    .option('--keep <n>', "layers whose attention output is kept for backward, or 'auto' (default)")
    .option('--without <list>', `do without ${optimizations.join(', ')}`)
    .option('--host', 'every gradient checkpoint in host memory')
    .option('--no-deterministic', 'attention backward in no fixed order of additions')
    .option('--profile', 'after the timed step another one: device time by op')
    .option('--probe', 'memory probe: all layers reserved, two executed')
    .option('--search', 'with --probe: the longest length that fits', false)
    .addOption(new Option('--compare <optimization>', 'paired runs with and without it').choices([...optimizations]))
    .option('--rounds <n>', 'pairs of --compare; default 3 to 9, by how long one takes')
    .option('--check-chunk <n>', 'loss and gradients against those of another chunk size')
    .action(stepCommand);
  model('table1', 'longest length and memory by optimization, one more in each row', 'length of the whole steps')
    .option(
      '--rows <list>',
      'rows to run, by name or number: none, chunked-ce, offload-ckpt, tiled-mlp, chunks (each with those before it)',
    )
    .option('--no-search', 'leave the longest lengths out')
    .action(table1Command);
}
