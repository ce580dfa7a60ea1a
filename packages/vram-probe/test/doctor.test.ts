import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buildInfo, numThreads } from '@lc/tensor';
import { expectNoLeaks } from '@lc/tensor/testing';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { versionProblems } from '../src/doctor.js';
import {
  copyBandwidth,
  type DoctorReport,
  doctor,
  formatDoctor,
  type InstalledPackage,
  installedPackages,
  runDoctor,
} from '../src/index.js';
import { buildInfoOf } from '../src/installed.js';

expectNoLeaks();
const home = mkdtempSync(join(tmpdir(), 'lc-doctor-'));
afterAll(() => rmSync(home, { recursive: true, force: true }));

const INFO = { version: '1.2.3', abi: '1.1', napi: 8, compiler: 'g++ 12', cuda: true, cudaTargets: '80,90a' };
/** A project with these packages under node_modules/@lc. */
function project(name: string, packages: Record<string, { version: string; native?: 'addon' | 'none' | 'old' }>): string {
  const dir = join(home, name);
  for (const [each, { version, native }] of Object.entries(packages)) {
    const at = join(dir, 'node_modules/@lc', each);
    const prebuilds = join(at, 'prebuilds', `${process.platform}-${process.arch}`);
    mkdirSync(native === 'addon' || native === 'old' ? prebuilds : at, { recursive: true });
    const files = native ? ['dist', 'prebuilds'] : ['dist'];
    writeFileSync(join(at, 'package.json'), JSON.stringify({ name: `@lc/${each}`, version, files }));
    if (native === 'addon')
      writeFileSync(join(prebuilds, `@lc+${each}.glibc.node`), `\x7fELF...\0lc_build_info ${JSON.stringify(INFO)}\0...`);
    if (native === 'old') writeFileSync(join(prebuilds, `@lc+${each}.glibc.node`), '\x7fELF');
  }
  return dir;
}
const under = (dir: string): InstalledPackage[] => installedPackages([dir]).filter(({ path }) => path.startsWith(dir));

describe('installedPackages', () => {
  it('reads version, ABI and targets from the files, and loads nothing', () => {
    const dir = project('user', {
      tensor: { version: '1.2.3', native: 'addon' },
      qlora: { version: '1.2.3', native: 'none' },
      attention: { version: '1.2.2', native: 'old' },
      data: { version: '1.2.3' },
    });
    expect(under(dir)).toEqual([
      expect.objectContaining({
        name: '@lc/attention',
        version: '1.2.2',
        native: { file: expect.stringMatching(/@lc\+attention/), build: null },
      }),
      expect.objectContaining({ name: '@lc/data', version: '1.2.3', native: null }),
      expect.objectContaining({ name: '@lc/qlora', native: { file: null, build: null } }),
      expect.objectContaining({
        name: '@lc/tensor',
        path: join(dir, 'node_modules/@lc/tensor'),
        native: { file: expect.any(String), build: INFO },
      }),
    ]);
    expect(buildInfoOf(join(dir, 'nowhere'))).toBeNull();
  });

  it('finds every copy: in folders above, and in other projects that are asked for', () => {
    const one = project('one', { tensor: { version: '1.0.0', native: 'addon' } });
    const inner = project('one/inner', { tensor: { version: '2.0.0', native: 'addon' } });
    expect(under(one).map(({ version }) => version)).toEqual(['1.0.0']);
    const both = installedPackages([inner]).filter(({ path }) => path.startsWith(one));
    expect(both.map(({ version }) => version).sort()).toEqual(['1.0.0', '2.0.0']);
    expect(versionProblems(both)).toEqual([
      {
        code: 'ERR_LC_ABI',
        message: expect.stringMatching(/^2 copies of @lc\/tensor: @lc\/tensor 2\.0\.0 \(ABI 1\.1\) in .*; @lc\/tensor 1\.0\.0 .*dedupe/),
        broken: false,
      },
      { code: 'ERR_LC_ABI', message: expect.stringMatching(/^@lc packages of 2 versions: .*npm update/), broken: false },
    ]);
    expect(versionProblems(under(one))).toEqual([]);
  });
});

describe('doctor', () => {
  it('tells machine and installation, and what would not work', async () => {
    const report = await doctor();
    expect(report).toMatchObject({
      schema: 1,
      node: process.version,
      platform: `${process.platform}-${process.arch}`,
      glibc: { version: expect.stringMatching(/^2\.\d+$/), needed: '2.34' },
      build: buildInfo(),
      threads: numThreads(),
      ram: { totalBytes: expect.any(Number) },
    });
    expect(report.packages.map(({ name }) => name)).toEqual(expect.arrayContaining(['@lc/attention', '@lc/chunked-ce', '@lc/tensor']));
    expect(report.problems.filter(({ broken }) => broken)).toEqual([]);
    if (!report.cuda.available) {
      expect(report.problems).toContainEqual({
        code: report.cuda.code,
        message: `device 'cuda' cannot be used: ${report.cuda.message}`,
        broken: false,
      });
      expect(report.bandwidth).toEqual([]);
    }
    const text = formatDoctor(report);
    for (const { name } of report.packages) expect(text).toContain(name);
    for (const { code } of report.problems) expect(text).toContain(code);
  });

  it('goes on where a package is broken: says which and why, and gives exit code 3', async () => {
    const dir = project('broken', { qlora: { version: '0.0.0', native: 'none' } });
    const write = vi.spyOn(process.stdout, 'write').mockReturnValue(true);
    try {
      expect(await runDoctor({ json: true, from: [dir] })).toBe(3);
      const report = JSON.parse(write.mock.calls.map(([text]) => String(text)).join('')) as DoctorReport;
      expect(report.problems[0]).toMatchObject({
        code: 'ERR_LC_NO_PREBUILD',
        broken: true,
        message: expect.stringMatching(/^@lc\/qlora: no native binary .*\n.*prebuilds is missing/),
      });
    } finally {
      write.mockRestore();
    }
  });

  it('prints GPUs, bandwidth, limits and cuBLASLt where there are any', () => {
    const GiB = 2 ** 30;
    const report: DoctorReport = {
      schema: 1,
      node: 'v22.0.0',
      platform: 'linux-x64',
      glibc: { version: '2.39', needed: '2.34' },
      build: INFO,
      threads: 16,
      ram: { totalBytes: 64 * GiB, availableBytes: 48 * GiB, physicalBytes: 128 * GiB, limitedBy: '/sys/fs/cgroup/memory.max' },
      cpus: 16,
      gpus: [
        {
          device: 'cuda:0',
          name: 'NVIDIA H100 80GB HBM3',
          computeCapability: '9.0',
          driver: '13.0',
          totalBytes: 79 * GiB,
          freeBytes: 78 * GiB,
        },
      ],
      nvidiaDriver: '580.95',
      cuda: { available: true },
      lockedMemory: { softBytes: 8 << 20, hardBytes: null },
      bandwidth: [{ device: 'cuda:0', pinned: true, toDevice: { bytesPerSecond: 55.3e9 }, toHost: { bytesPerSecond: 53e9 } }],
      cublasLt: null,
      packages: [{ name: '@lc/tensor', version: '1.2.3', path: '/app/tensor', native: { file: '/app/tensor/a.node', build: INFO } }],
      problems: [],
    };
    expect(formatDoctor(report).split('\n')).toEqual([
      'Node        v22.0.0 on linux-x64, glibc 2.39 (needs 2.34)',
      'CPU         16 CPUs, 16 threads',
      'RAM         48.00 GiB available of 64.00 GiB (limit /sys/fs/cgroup/memory.max; the machine has 128.00 GiB)',
      'locked      ulimit -l: 8.0 MiB, at most unlimited',
      'driver      NVIDIA 580.95',
      'CUDA        code for 80,90a',
      'cuda:0      NVIDIA H100 80GB HBM3, compute capability 9.0, driver for CUDA 13.0, 78.00 GiB free of 79.00 GiB',
      '            cuda:0: copies 55.3 GB/s to it, 53.0 GB/s back, pinned',
      "cuBLASLt    not found: GEMM uses lc's own kernels",
      '@lc/tensor  1.2.3, ABI 1.1, CUDA 80,90a  /app/tensor',
      'Everything works.',
      '',
    ]);
  });
});

it('bandwidth is measured both ways; on the CPU that is its own memory', async () => {
  const measured = await copyBandwidth('cpu');
  expect(measured?.toDevice.bytesPerSecond).toBeGreaterThan(1e8);
  expect(measured?.toHost.bytesPerSecond).toBeGreaterThan(1e8);
});
