import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { memInfo } from '@lc/tensor';
import { afterAll, describe, expect, it } from 'vitest';
import { cpuCount, probe, ramInfo } from '../src/index.js';

const GiB = 2 ** 30;
const made: string[] = [];
afterAll(() => {
  for (const folder of made) rmSync(folder, { recursive: true, force: true });
});

/** A machine of 64 GiB with 48 GiB available, and these files. */
function machine(files: Record<string, string>): string {
  const root = mkdtempSync(join(tmpdir(), 'lc-probe-'));
  made.push(root);
  const all = { 'proc/meminfo': 'MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   50331648 kB\n', ...files };
  for (const [path, text] of Object.entries(all)) {
    mkdirSync(dirname(join(root, path)), { recursive: true });
    writeFileSync(join(root, path), text);
  }
  return root;
}
const summary = (files: Record<string, string>) => {
  const { totalBytes, availableBytes, limitedBy } = ramInfo(machine(files));
  return [totalBytes / GiB, availableBytes / GiB, limitedBy];
};

describe('ramInfo', () => {
  it('a machine without limits', () => {
    expect(summary({})).toEqual([64, 48, null]);
    expect(summary({ 'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/memory.max': 'max\n' })).toEqual([64, 48, null]);
  });

  it('cgroup 2: a limit on the own folder; page cache that can be dropped is available', () => {
    const folder = 'sys/fs/cgroup/user.slice/app.scope';
    expect(
      summary({
        'proc/self/cgroup': '0::/user.slice/app.scope\n',
        [`${folder}/memory.max`]: `${16 * GiB}\n`,
        [`${folder}/memory.current`]: `${10 * GiB}\n`,
        [`${folder}/memory.stat`]: `anon ${6 * GiB}\nfile ${4 * GiB}\ninactive_file ${3 * GiB}\nactive_file ${GiB}\n`,
      }),
    ).toEqual([16, 9, `/${folder}/memory.max`]);
  });

  it('cgroup 2: limits above it hold as well, memory.high too; the tightest of each counts', () => {
    expect(
      summary({
        'proc/self/cgroup': '0::/a/b/c\n',
        'sys/fs/cgroup/a/memory.max': `${32 * GiB}`,
        'sys/fs/cgroup/a/memory.current': `${31 * GiB}`, // others of this group use it up
        'sys/fs/cgroup/a/b/memory.max': 'max',
        'sys/fs/cgroup/a/b/memory.high': `${8 * GiB}`,
        'sys/fs/cgroup/a/b/memory.current': `${2 * GiB}`,
        'sys/fs/cgroup/a/b/c/memory.max': `${20 * GiB}`,
        'sys/fs/cgroup/a/b/c/memory.current': `${GiB}`,
      }),
    ).toEqual([8, 1, '/sys/fs/cgroup/a/b/memory.high']);
  });

  it('cgroup 2 inside a container: the path of the host is not there, the limit lies at the root', () => {
    const files = { 'sys/fs/cgroup/memory.max': `${4 * GiB}`, 'sys/fs/cgroup/memory.current': `${GiB}` };
    expect(summary({ 'proc/self/cgroup': '0::/docker/0123abcd\n', ...files })).toEqual([4, 3, '/sys/fs/cgroup/memory.max']);
    expect(summary({ 'proc/self/cgroup': '0::/../../other\n', ...files })).toEqual([4, 3, '/sys/fs/cgroup/memory.max']);
  });

  it("cgroup 1: own limit, the hierarchy's, and the number that means none", () => {
    const cgroup = '12:cpu,cpuacct:/\n5:memory:/docker/0123abcd\n1:name=systemd:/\n';
    const folder = 'sys/fs/cgroup/memory/docker/0123abcd';
    const none = '9223372036854771712';
    const usage = { [`${folder}/memory.usage_in_bytes`]: `${6 * GiB}` };
    const stat = (limit: string) => ({
      [`${folder}/memory.stat`]: `cache 0\ninactive_file 1\nhierarchical_memory_limit ${limit}\ntotal_inactive_file ${2 * GiB}\n`,
    });
    const limit = (value: string) => ({ [`${folder}/memory.limit_in_bytes`]: value });
    const name = `/${folder}/memory.limit_in_bytes`;
    expect(summary({ 'proc/self/cgroup': cgroup, ...usage, ...stat(none), ...limit(`${10 * GiB}\n`) })).toEqual([10, 6, name]);
    expect(summary({ 'proc/self/cgroup': cgroup, ...usage, ...stat(`${8 * GiB}`), ...limit(none) })).toEqual([8, 4, name]);
    expect(summary({ 'proc/self/cgroup': cgroup, ...usage, ...stat(none), ...limit(none) })).toEqual([64, 48, null]);
  });

  it('a group that uses more than its limit has nothing available; a limit beyond the machine is none; rubbish is ignored', () => {
    const at = (max: string, current: string) =>
      summary({ 'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/memory.max': max, 'sys/fs/cgroup/memory.current': current });
    expect(at(`${GiB}`, `${2 * GiB}`)).toEqual([1, 0, '/sys/fs/cgroup/memory.max']);
    expect(at(`${100 * GiB}`, '0')).toEqual([64, 48, null]);
    expect(at('', 'many')).toEqual([64, 48, null]);
    expect(at('-1', '0')).toEqual([64, 48, null]);
  });

  it("without /proc: the runtime's own count", () => {
    const info = ramInfo(join(tmpdir(), 'lc-no-such-machine'));
    expect(info.totalBytes).toBeGreaterThan(0);
    expect(info.limitedBy).toBeNull();
  });

  it('of this machine: never more than the allocator believes', () => {
    const [info, native] = [ramInfo(), memInfo('cpu')];
    expect(info.totalBytes).toBeLessThanOrEqual(native.totalBytes);
    expect(info.availableBytes).toBeLessThanOrEqual(native.freeBytes + GiB); // read at another moment
  });
});

describe('cpuCount', () => {
  const count = (files: Record<string, string>) => cpuCount(machine(files), 16);
  it('is the affinity, or the quota of CPU time', () => {
    expect(count({})).toBe(16);
    expect(count({ 'proc/self/cgroup': '0::/a\n', 'sys/fs/cgroup/a/cpu.max': 'max 100000\n' })).toBe(16);
    expect(count({ 'proc/self/cgroup': '0::/a/b\n', 'sys/fs/cgroup/a/cpu.max': '250000 100000\n' })).toBe(3);
    expect(count({ 'proc/self/cgroup': '0::/\n', 'sys/fs/cgroup/cpu.max': '10000 100000\n' })).toBe(1);
    const v1 = { 'proc/self/cgroup': '3:cpu,cpuacct:/x\n', 'sys/fs/cgroup/cpu/x/cpu.cfs_period_us': '100000\n' };
    expect(count({ ...v1, 'sys/fs/cgroup/cpu/x/cpu.cfs_quota_us': '400000\n' })).toBe(4);
    expect(count({ ...v1, 'sys/fs/cgroup/cpu/x/cpu.cfs_quota_us': '-1\n' })).toBe(16);
  });
});

describe('probe', () => {
  it('reports RAM, CPUs, and why there is no CUDA', () => {
    const p = probe();
    expect(p.ram.totalBytes).toBeGreaterThanOrEqual(p.ram.availableBytes);
    expect(p.cpus).toBeGreaterThan(0);
    if (!p.cuda.available) {
      expect(p.cuda.code).toMatch(/^ERR_LC_(NO_PREBUILD|NO_DRIVER|DRIVER_TOO_OLD|NO_DEVICE|NO_KERNEL_IMAGE)$/);
      expect(p.cuda.message.length).toBeGreaterThan(20);
      expect(p.gpus).toEqual([]);
    }
  });

  it("knows the driver's version even where it cannot be used", () => {
    const at = (text: string) => probe({ root: machine({ 'proc/driver/nvidia/version': text }) }).nvidiaDriver;
    expect(at('NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12\n')).toBe(
      '535.183.01',
    );
    expect(at('NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@x)\n')).toBe('580.95.05');
    expect(at('something else')).toBeNull();
    expect(probe({ root: machine({}) }).nvidiaDriver).toBeNull();
  });
});
