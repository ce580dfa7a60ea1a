/** What this machine and this installation can do, and what would not work and why: `npx @lc/vram-probe` and `lc doctor`. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { type BuildInfo, buildInfo, cublasLt, GLIBC_NEEDED, glibcVersion, loadAddon, numThreads, requireDevice } from '@lc/tensor';
import { type CopyBandwidth, copyBandwidth } from './bandwidth.js';
import { type InstalledPackage, installedPackages } from './installed.js';
import { type Probe, probe } from './probe.js';

/** Something that would not work. */
export interface Problem {
  /** An error code of @lc/tensor. */
  code: string;
  /** What would not work, why, and what to do. */
  message: string;
  /** Whether the installation is broken; otherwise only GPUs cannot be used. */
  broken: boolean;
}

/** Machine and installation, and what would not work. */
export interface DoctorReport extends Probe {
  schema: 1;
  node: string;
  platform: string;
  glibc: { version: string | null; needed: string };
  /** Of @lc/tensor's binary; null where it does not load. */
  build: BuildInfo | null;
  /** CPU threads that ops use; null where @lc/tensor does not load. */
  threads: number | null;
  /** What a process may lock in RAM (`ulimit -l`). null: no limit, or not known. */
  lockedMemory: { softBytes: number | null; hardBytes: number | null };
  /** One entry per usable GPU. */
  bandwidth: CopyBandwidth[];
  /** Path of the cuBLASLt that GEMM uses; null: lc's own kernels do. */
  cublasLt: string | null;
  packages: InstalledPackage[];
  problems: Problem[];
}

/** RLIMIT_MEMLOCK. */
export function lockedMemory(root = '/'): DoctorReport['lockedMemory'] {
  let line: RegExpExecArray | null = null;
  try {
    line = /^Max locked memory\s+(\S+)\s+(\S+)/m.exec(readFileSync(join(root, 'proc/self/limits'), 'utf8'));
  } catch {
    // no /proc
  }
  const bytes = (text: string | undefined): number | null => (text && /^\d+$/.test(text) ? Number(text) : null);
  return { softBytes: bytes(line?.[1]), hardBytes: bytes(line?.[2]) };
}

const problemOf = (error: unknown, broken: boolean): Problem => {
  const { code = 'ERR_LC_DLOPEN', message } = error as { code?: string; message: string };
  return { code, message, broken };
};

/** Loads every binary once, as using the package would. */
function loadProblems(packages: readonly InstalledPackage[]): Problem[] {
  const problems: Problem[] = [];
  try {
    buildInfo();
  } catch (error) {
    return [problemOf(error, true)]; // every other package needs it
  }
  for (const { name, path, native } of packages) {
    if (!native || name === '@lc/tensor') continue;
    try {
      loadAddon({ packageName: name, from: join(path, 'dist/index.js') })();
    } catch (error) {
      problems.push(problemOf(error, true));
    }
  }
  return problems;
}

/** Packages that were not meant for each other. */
export function versionProblems(packages: readonly InstalledPackage[]): Problem[] {
  const problems: Problem[] = [];
  const text = ({ name, version, native, path }: InstalledPackage): string =>
    `${name} ${version}${native?.build ? ` (ABI ${native.build.abi})` : ''} in ${path}`;
  const cores = packages.filter(({ name }) => name === '@lc/tensor');
  if (cores.length > 1) {
    problems.push({
      code: 'ERR_LC_ABI',
      message: `${cores.length} copies of @lc/tensor: ${cores.map(text).join('; ')}. Tensors of one are none to packages that use the other, unless their ABI is the same: npm dedupe (pnpm dedupe, yarn dedupe)`,
      broken: new Set(cores.flatMap(({ native }) => native?.build?.abi.split('.')[0] ?? [])).size > 1,
    });
  }
  const versions = new Set(packages.map(({ version }) => version));
  if (versions.size > 1) {
    problems.push({
      code: 'ERR_LC_ABI',
      message: `@lc packages of ${versions.size} versions: ${packages.map(({ name, version }) => `${name} ${version}`).join(', ')}. They are made and tested as one version: npm update "@lc/*"`,
      broken: false,
    });
  }
  return problems;
}

/**
 * Everything about machine and installation. Loads all binaries, and asks the driver; where there is a GPU, copies 128 MiB to and fro. Never throws for what is missing.
 * @param options.from further files or folders from which packages are found, beside the working directory and this package
 * @param options.root where /proc and /sys are, for tests
 */
export async function doctor(options: { from?: readonly string[]; root?: string } = {}): Promise<DoctorReport> {
  const { root = '/', from = [] } = options;
  const packages = installedPackages([process.cwd(), fileURLToPath(import.meta.url), ...from]);
  const problems = [...loadProblems(packages), ...versionProblems(packages)];
  const loads = !problems.some(({ message }) => message.startsWith('@lc/tensor:'));
  const seen = probe({ root });
  if (!seen.cuda.available && loads) {
    const { code, message } = seen.cuda;
    problems.push({ code, message: `device 'cuda' cannot be used: ${message}`, broken: false });
  }
  const bandwidth: CopyBandwidth[] = [];
  for (const { device } of seen.gpus) {
    try {
      requireDevice(device);
      const measured = await copyBandwidth(device);
      if (measured) bandwidth.push(measured);
    } catch (error) {
      const { code, message } = problemOf(error, false);
      if (!problems.some((problem) => problem.message.includes(message)))
        problems.push({ code, message: `${device}: ${message}`, broken: false });
    }
  }
  return {
    schema: 1,
    node: process.version,
    platform: `${process.platform}-${process.arch}`,
    glibc: { version: glibcVersion(), needed: GLIBC_NEEDED },
    build: loads ? buildInfo() : null,
    threads: loads ? numThreads() : null,
    ...seen,
    lockedMemory: lockedMemory(root),
    bandwidth,
    cublasLt: seen.cuda.available ? cublasLt() : null,
    packages,
    problems,
  };
}

const gib = (bytes: number): string => (bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 2 ** 30).toFixed(2)} GiB`);

function cudaOf(build: BuildInfo | null): string {
  if (!build) return '? (@lc/tensor does not load)';
  return build.cuda
    ? `code for ${build.cudaTargets ?? '?'}${build.cudaToolkit ? `, toolkit ${build.cudaToolkit}` : ''}`
    : 'no code for it in this build';
}

/** The report for people. */
export function formatDoctor(report: DoctorReport): string {
  const { node, platform, glibc, ram, cpus, threads, gpus, nvidiaDriver, build, cuda } = report;
  const { softBytes, hardBytes } = report.lockedMemory;
  const rows: [string, string][] = [
    ['Node', `${node} on ${platform}, ${glibc.version ? `glibc ${glibc.version}` : 'no glibc'} (needs ${glibc.needed})`],
    ['CPU', `${cpus} CPUs${threads === null ? '' : `, ${threads} threads`}`],
    [
      'RAM',
      `${gib(ram.availableBytes)} available of ${gib(ram.totalBytes)}${ram.limitedBy ? ` (limit ${ram.limitedBy}; the machine has ${gib(ram.physicalBytes)})` : ''}`,
    ],
    [
      'locked',
      `ulimit -l: ${softBytes === null ? 'unlimited' : gib(softBytes)}${hardBytes === softBytes ? '' : `, at most ${hardBytes === null ? 'unlimited' : gib(hardBytes)}`}`,
    ],
    ['driver', nvidiaDriver ? `NVIDIA ${nvidiaDriver}` : 'no NVIDIA kernel module'],
    ['CUDA', cudaOf(build)],
    ...gpus.map((g): [string, string] => [
      g.device,
      `${g.name}, compute capability ${g.computeCapability ?? '?'}, driver for CUDA ${g.driver ?? '?'}, ${gib(g.freeBytes)} free of ${gib(g.totalBytes)}`,
    ]),
    ...report.bandwidth.map((b): [string, string] => [
      '',
      `${b.device}: copies ${(b.toDevice.bytesPerSecond / 1e9).toFixed(1)} GB/s to it, ${(b.toHost.bytesPerSecond / 1e9).toFixed(1)} GB/s back, ${b.pinned ? 'pinned' : 'NOT pinned'}`,
    ]),
    ...(cuda.available ? ([['cuBLASLt', report.cublasLt ?? "not found: GEMM uses lc's own kernels"]] as [string, string][]) : []),
    ...report.packages.map(({ name, version, native, path }): [string, string] => {
      const about = native?.build
        ? `ABI ${native.build.abi}, ${native.build.cuda ? `CUDA ${native.build.cudaTargets ?? '?'}` : 'CPU only'}`
        : native && (native.file ? 'a binary without build information' : 'NO BINARY');
      return [name, `${version}${about ? `, ${about}` : ''}  ${path}`];
    }),
  ];
  const width = Math.max(...rows.map(([key]) => key.length));
  const lines = rows.map(([key, value]) => `${key.padEnd(width)}  ${value}`);
  const indent = (text: string): string => text.replaceAll('\n', '\n    ');
  const problems = report.problems.map(({ code, message }) => `  ${code}: ${indent(message)}`);
  return `${[...lines, problems.length > 0 ? 'What would not work:' : 'Everything works.', ...problems].join('\n')}\n`;
}

/** Runs it for a command line: the report on stdout. @returns the exit code: 3 where the installation is broken, else 0 */
export async function runDoctor(options: { json?: boolean; from?: readonly string[] } = {}): Promise<0 | 3> {
  const report = await doctor(options);
  process.stdout.write(options.json ? `${JSON.stringify(report)}\n` : formatDoctor(report));
  return report.problems.some(({ broken }) => broken) ? 3 : 0;
}
