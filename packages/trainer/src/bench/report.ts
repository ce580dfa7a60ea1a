/** What a bench found: tables for people, the same rows as JSON for programs. */
import { buildInfo, cublasLt, type DeviceLike, devices, LcError, numThreads, requireDevice } from '@lc/tensor';
import { writeFileAtomic } from '../files.js';

export type Row = Record<string, unknown>;

export interface Table {
  title?: string;
  /** Heads of the columns, with how a row fills them. */
  columns: readonly (readonly [head: string, cell: (row: Row) => string])[];
  rows: readonly Row[];
}

export interface Report {
  schema: 1;
  bench: string;
  /** Name of the card, or of the CPU. */
  device: string;
  /** bf16 on CUDA, f32 on the CPU. */
  dtype: string;
  /** Version of lc, driver, cuBLASLt. */
  environment: Row;
  /** The command line, for repeating it. */
  command: string;
  time: string;
  /** false while it runs: what `--out` holds meanwhile. */
  done: boolean;
  tables: Table[];
  notes: string[];
}

export interface OutputOptions {
  json?: boolean | undefined;
  /** A file that gets the report as JSON, also while the bench runs. */
  out?: string | undefined;
}

/** The device that was asked for. @throws ERR_LC_NO_DRIVER and its kin, with the way out */
export function benchDevice(device: string): DeviceLike {
  if (!/^(cpu|cuda(:\d+)?)$/.test(device)) throw new LcError('ERR_LC_CONFIG', `--device: expected cpu, cuda or cuda:N, got '${device}'`);
  try {
    requireDevice(device as DeviceLike);
  } catch (error) {
    const { code, message } = error as LcError;
    if (typeof code !== 'string') throw error;
    throw new LcError(code, `${message}. lc bench measures a GPU; --device cpu tries it on the CPU, at sizes for a CPU`, { cause: error });
  }
  return device as DeviceLike;
}

export function newReport(bench: string, device: DeviceLike): Report {
  const onGpu = device !== 'cpu';
  const id = device === 'cuda' ? 'cuda:0' : device;
  const card = devices().find((d) => d.device === id);
  const { version, cudaTargets } = buildInfo();
  return {
    ...{ schema: 1, bench, dtype: onGpu ? 'bf16' : 'f32' },
    device: onGpu ? (card?.name ?? String(device)) : `CPU, ${numThreads()} threads`,
    environment: {
      version,
      ...(onGpu ? { driver: card?.driver, computeCapability: card?.computeCapability, cudaTargets, cublasLt: cublasLt() } : {}),
    },
    command: ['lc', ...process.argv.slice(2)].join(' '),
    ...{ time: new Date().toISOString(), done: false, tables: [], notes: [] },
  };
}

export const fixed =
  (key: string, digits: number, unit = '') =>
  (row: Row): string =>
    typeof row[key] === 'number' ? `${(row[key] as number).toFixed(digits)}${unit}` : '';
export const text =
  (key: string) =>
  (row: Row): string =>
    row[key] === undefined || row[key] === null ? '' : String(row[key]);
export const count = (n: number): string => n.toLocaleString('en-US');
export const gibibytes = (bytes: number): string =>
  bytes < 2 ** 27 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 2 ** 30).toFixed(2)} GiB`;

export function markdown(table: Table): string {
  const lines = [
    table.columns.map(([head]) => head),
    table.columns.map(() => '---'),
    ...table.rows.map((row) => table.columns.map(([, cell]) => cell(row))),
  ];
  return `${table.title ? `${table.title}\n\n` : ''}${lines.map((cells) => `| ${cells.join(' | ')} |`).join('\n')}`;
}

const asJson = (report: Report): string =>
  `${JSON.stringify({ ...report, tables: report.tables.map(({ title, rows }) => ({ ...(title ? { title } : {}), rows })) })}\n`;

/** Writes what is there so far, where a file was asked for. */
export function save(report: Report, { out }: OutputOptions): void {
  if (out) writeFileAtomic(out, asJson(report));
}

/** Prints and saves the whole. */
export function finish(report: Report, options: OutputOptions): void {
  report.done = true;
  save(report, options);
  if (options.json) {
    process.stdout.write(asJson(report));
    return;
  }
  const { driver, cublasLt: library } = report.environment;
  const about = [
    report.device,
    report.dtype,
    ...(driver ? [`driver for CUDA ${driver}`, `cuBLASLt ${library ? 'found' : 'not found'}`] : []),
  ];
  const parts = [`${about.join('; ')}; ${report.time.slice(0, 10)}, ${report.command}`, ...report.tables.map(markdown), ...report.notes];
  process.stdout.write(`${parts.join('\n\n')}\n`);
}
