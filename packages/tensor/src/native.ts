/** Loads native addons: `@lc/tensor`'s own, and those of the other packages, which are handed its table once. */
import { existsSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { diagnose, explain, here, updateCommand } from './diagnose.js';
import { LcError, LcTypeError } from './errors.js';
import { throwsTyped } from './typed-addon.js';

/** Opaque native handle of an allocation (a type-tagged `napi_external`). */
export type Handle = { readonly __lcHandle: unique symbol };

/** What an allocator has handed out. Borrowed memory is not counted. */
export interface CounterSnapshot {
  liveBytes: number;
  peakBytes: number;
  liveTensors: number;
  /** Allocations ever made. */
  allocations: number;
}
/** What the allocator of one device has handed out, in all and by the label that allocations were given. */
export interface DeviceMemory extends CounterSnapshot {
  byLabel: Record<string, CounterSnapshot>;
}
/** Memory of one device, in bytes. */
export interface MemInfo {
  /**
   * Bytes free on the device now; for the CPU: RAM available to this process, cgroup limits included. Within `setVramLimit` or `setRamLimit`, where one is set.
   */
  freeBytes: number;
  totalBytes: number;
  /** Bytes that lc's allocator holds, now and at most. */
  liveBytes: number;
  peakBytes: number;
}
/** What a binary was built from. Every addon has it as `buildInfo`, and as exported text `lc_build_info` that can be read from the file. */
export interface BuildInfo {
  version: string;
  abi: string;
  /** Node-API version that it needs. */
  napi: number;
  /** Whether this binary contains CUDA code. */
  cuda: boolean;
  /** e.g. `80,90a,100,120`; code runs on later minor versions of its major one. */
  cudaTargets?: string;
  cudaToolkit?: string;
  compiler: string;
}

/** An ArrayBuffer over an allocation, and what gives it back. */
export interface Loan {
  buffer: ArrayBuffer;
  loan?: object;
}

/** What native/addon.cc exports. Ops and CUDA add theirs in gemm.ts, rowops.ts and cuda.ts. */
export interface CoreNative {
  api: object;
  /** True when another copy of @lc/tensor was loaded first and its table is used. */
  adopted: boolean;
  buildInfo: BuildInfo;
  numThreads(): number;
  alloc(dtype: number, shape: readonly number[], deviceType: number, deviceId: number, zero: boolean, label: string): Handle;
  dispose(handle: Handle): boolean;
  fromTypedArray(array: NodeJS.TypedArray, dtype: number, shape: readonly number[], label: string): Handle;
  fromPointer(
    ptr: bigint,
    nbytes: number,
    deviceType: number,
    deviceId: number,
    dtype: number,
    shape: readonly number[],
    label: string,
    release?: () => void,
  ): Handle;
  pointer(handle: Handle): bigint;
  buffer(handle: Handle): Loan;
  detach(buffer: ArrayBuffer, loan: object | undefined): void;
  memory(): Record<string, DeviceMemory>;
  resetPeak(): void;
  memInfo(deviceType: number, deviceId: number): MemInfo;
  setMemoryLimit(deviceType: number, deviceId: number, bytes: number): void;
  processMemory(deviceId: number): {
    source: number;
    bytes: number;
    peakBytes: number;
    poolBytes: number;
    poolUsedBytes: number;
    limitBytes: number;
  };
  toDLPack(args: { x: unknown }): object;
  dlpackPointer(external: object): bigint;
  fromDLPack(
    source: object | bigint,
    label: string,
  ): { handle: Handle; dtype: number; shape: number[]; strides: number[]; deviceType: number; deviceId: number };
}

interface NodeGypBuild {
  path(dir: string): string;
}

/** The package folder of a file in its `src/` or `dist/`. */
function packageRoot(from: string): string {
  const file = from.startsWith('file:') ? fileURLToPath(from) : from;
  return dirname(dirname(file));
}

/** The version in a package's own manifest; '' where it cannot be read. */
function versionOf(root: string): string {
  try {
    return (JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version?: string }).version ?? '';
  } catch {
    return '';
  }
}

/** A bundle keeps all addons in one folder, without packages around them. Set, it is the only place. */
function findBinary(packageName: string, root: string): string {
  const folder = process.env.LCTX_ADDON_DIR;
  if (!folder) return (createRequire(import.meta.url)('node-gyp-build') as NodeGypBuild).path(root);
  const file = join(folder, `${packageName.replace('/', '+')}.glibc.node`);
  if (!existsSync(file)) throw new Error(`${file} does not exist`);
  return file;
}

function load(packageName: string, from: string): unknown {
  const root = packageRoot(from);
  const failed = (code: 'ERR_LC_NO_PREBUILD' | 'ERR_LC_DLOPEN', what: string, file: string | null, cause: unknown): LcError =>
    new LcError(code, explain(`${packageName}: ${what}`, diagnose({ packageName, root, file, cause }, here())), { cause });
  let file: string;
  try {
    file = findBinary(packageName, root);
  } catch (cause) {
    throw failed('ERR_LC_NO_PREBUILD', `no native binary for ${process.platform}-${process.arch}`, null, cause);
  }
  try {
    return throwsTyped(() => createRequire(join(root, 'package.json'))(file) as object);
  } catch (cause) {
    if (cause instanceof LcError || cause instanceof LcTypeError) throw cause;
    throw failed('ERR_LC_DLOPEN', 'its native binary did not load', file, cause);
  }
}

/** An addon that does not take @lc/tensor's table: both packages, their versions and ABIs, and where they lie. */
function abiMismatch(packageName: string, from: string, addon: Partial<BuildInfo> | undefined, cause: Error): LcTypeError {
  const root = packageRoot(from);
  const tensor = packageRoot(import.meta.url);
  const of = (version: string | undefined, abi: string | undefined, at: string): string =>
    `${version || '(version unknown)'}${abi ? `, ABI ${abi},` : ''} in ${at}`;
  const { version, abi } = core().buildInfo;
  return new LcTypeError(
    'ERR_LC_ABI',
    `${packageName} ${of(versionOf(root) || addon?.version, addon?.abi, root)} does not fit @lc/tensor ${of(version, abi, tensor)}: ${cause.message}. ` +
      `All @lc packages share one version: ${updateCommand(root, here())}`,
    { cause },
  );
}

let coreNative: unknown;

/** This package's addon; loaded at the first use, so that importing never touches native code or a GPU. */
export function core<T = CoreNative>(): T {
  coreNative ??= load('@lc/tensor', import.meta.url);
  return coreNative as T;
}

/**
 * For packages with an addon: returns a function that loads it once and hands it `@lc/tensor`'s table.
 *
 * @param options.from `import.meta.url` of a file in the package's `src/` or `dist/`.
 * @throws LcError `ERR_LC_NO_PREBUILD`, `ERR_LC_DLOPEN`, `ERR_LC_ABI` (both versions named) at the first call of the returned function.
 */
export function loadAddon<T extends object>(options: { packageName: string; from: string }): () => T {
  let addon: (T & { init(api: object): void }) | undefined;
  return () => {
    if (!addon) {
      const loaded = load(options.packageName, options.from) as T & { init(api: object): void; buildInfo?: BuildInfo };
      try {
        loaded.init(core().api);
      } catch (cause) {
        if ((cause as { code?: string }).code !== 'ERR_LC_ABI') throw cause;
        throw abiMismatch(options.packageName, options.from, loaded.buildInfo, cause as Error);
      }
      addon = loaded;
    }
    return addon;
  };
}

/** Version, ABI, compiler and CUDA targets of the loaded binary. */
export function buildInfo(): BuildInfo {
  return core().buildInfo;
}

/** Threads of the CPU pool: the CPUs this process may use (affinity and cgroup), or `LCTX_NUM_THREADS`. */
export function numThreads(): number {
  return core().numThreads();
}
