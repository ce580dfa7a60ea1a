/** RAM and CPU time that this process may use: /proc within the limits of its cgroup, versions 1 and 2. */
import { readFileSync } from 'node:fs';
import { availableParallelism, freemem, totalmem } from 'node:os';
import { join } from 'node:path';

/** RAM that this process may use, in bytes. */
export interface RamInfo {
  /** What may be used in all: the machine's RAM, or the smallest cgroup limit. */
  totalBytes: number;
  /** What is free now: the kernel's MemAvailable, and at most what each limit leaves (page cache that can be dropped counts as free). */
  availableBytes: number;
  /** RAM of the machine. */
  physicalBytes: number;
  /** The cgroup file that limits it; null: no limit below the machine's RAM. */
  limitedBy: string | null;
}

const read = (path: string): string | null => {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return null;
  }
};

/** A number of bytes; 'max', version 1's huge "no limit" and a missing file are null. */
function number(path: string): number | null {
  const text = read(path)?.trim();
  const value = text ? Number(text) : Number.NaN;
  return value >= 0 && value < 2 ** 60 ? value : null;
}

/** The value behind `key` in a file of "key value" lines. */
function field(path: string, key: string): number | null {
  const found = read(path)?.match(new RegExp(`^${key}:?\\s+(\\d+)`, 'm'));
  const value = found ? Number(found[1]) : Number.NaN;
  return value < 2 ** 60 ? value : null;
}

/** This process's folder of a hierarchy, and every folder above it: a limit on any of them holds. */
function folders(root: string, mount: string, controller: string): string[] {
  const lines = (read(join(root, 'proc/self/cgroup')) ?? '').split('\n').map((line) => line.split(':'));
  const line = lines.find(([, names]) => (controller ? names?.split(',').includes(controller) : names === ''));
  const parts = (line?.slice(2).join(':') ?? '').split('/').filter((part) => part !== '' && part !== '..');
  const all = [join(root, mount)];
  for (let n = 1; n <= parts.length; n++) all.push(join(root, mount, ...parts.slice(0, n))); // inside a container these may not be there
  return all;
}

const smallest = (...values: (number | null)[]): number | null => {
  const known = values.filter((value) => value !== null);
  return known.length > 0 ? Math.min(...known) : null;
};

/**
 * RAM that this process may use: /proc/meminfo within the limits of its cgroup and of those above it (v1 and v2).
 * @param root where /proc and /sys are; for tests, and for looking at another machine's files
 */
export function ramInfo(root = '/'): RamInfo {
  const meminfo = join(root, 'proc/meminfo');
  const physicalBytes = (field(meminfo, 'MemTotal') ?? Math.floor(totalmem() / 1024)) * 1024;
  const info: RamInfo = {
    totalBytes: physicalBytes,
    availableBytes: (field(meminfo, 'MemAvailable') ?? Math.floor(freemem() / 1024)) * 1024,
    physicalBytes,
    limitedBy: null,
  };
  const apply = (file: string, limit: number | null, used: number | null, droppable: number | null): void => {
    if (limit === null || limit >= physicalBytes) return;
    const inUse = Math.max(0, (used ?? 0) - (droppable ?? 0));
    info.availableBytes = Math.min(info.availableBytes, Math.max(0, limit - inUse));
    if (limit >= info.totalBytes) return;
    info.totalBytes = limit;
    info.limitedBy = `/${file.slice(root.length).replace(/^\/+/, '')}`;
  };
  for (const folder of folders(root, 'sys/fs/cgroup', '')) {
    const [used, droppable] = [number(join(folder, 'memory.current')), field(join(folder, 'memory.stat'), 'inactive_file')];
    // Beyond memory.high a process is not killed but slowed to a crawl: for a plan that is a limit, too.
    for (const name of ['memory.max', 'memory.high']) apply(join(folder, name), number(join(folder, name)), used, droppable);
  }
  for (const folder of folders(root, 'sys/fs/cgroup/memory', 'memory')) {
    const stat = join(folder, 'memory.stat');
    const file = join(folder, 'memory.limit_in_bytes');
    const limit = smallest(number(file), field(stat, 'hierarchical_memory_limit'));
    apply(file, limit, number(join(folder, 'memory.usage_in_bytes')), field(stat, 'total_inactive_file'));
  }
  return info;
}

/** CPUs this process may run on: its affinity, and its cgroup's quota of CPU time, rounded up. */
export function cpuCount(root = '/', parallelism = availableParallelism()): number {
  let cpus = parallelism;
  const quota = (time: number | null, period: number | null): void => {
    if (time !== null && time > 0 && period) cpus = Math.min(cpus, Math.ceil(time / period));
  };
  for (const folder of folders(root, 'sys/fs/cgroup', '')) {
    const [time, period] = (read(join(folder, 'cpu.max')) ?? 'max').trim().split(/\s+/);
    quota(time === 'max' ? null : Number(time), Number(period ?? 100_000));
  }
  for (const mount of ['sys/fs/cgroup/cpu', 'sys/fs/cgroup/cpu,cpuacct']) {
    for (const folder of folders(root, mount, 'cpu'))
      quota(number(join(folder, 'cpu.cfs_quota_us')), number(join(folder, 'cpu.cfs_period_us'))); // -1: no limit
  }
  return Math.max(1, cpus);
}

/** Version of the NVIDIA kernel module, as it says itself: there even where this build or this process cannot use CUDA. */
export function nvidiaDriver(root = '/'): string | null {
  return read(join(root, 'proc/driver/nvidia/version'))?.match(/Kernel Module[^\n]*?\s(\d+\.[\d.]+)\s/)?.[1] ?? null;
}
