/** native/detect.cjs: whether CUDA code is built, for which targets, and what turbo hashes of the compilers. */
import { spawnSync } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { root } from './workspace.js';

let dir: string;
let toolkit: string;
const tool = (path: string, text: string): void => {
  writeFileSync(path, `#!/bin/sh\n${text}\n`);
  chmodSync(path, 0o755);
};
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'lc-detect-'));
  toolkit = join(dir, 'cuda');
  for (const part of ['bin', 'include']) mkdirSync(join(toolkit, part), { recursive: true });
  writeFileSync(join(toolkit, 'include/cuda_runtime.h'), '');
  tool(join(toolkit, 'bin/nvcc'), 'echo release 13.0, V13.0.88');
  tool(join(dir, 'g++'), 'echo g++ 12.2.0');
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

const detect = (question: string, env: Record<string, string> = {}) => {
  const inherited = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(LCTX_|CXX|CUDA_)/.test(name)));
  const result = spawnSync(process.execPath, [join(root, 'native/detect.cjs'), question], {
    encoding: 'utf8',
    env: { ...inherited, CXX: join(dir, 'g++'), CUDA_HOME: toolkit, ...env },
  });
  return { out: result.stdout, error: result.stderr.trim(), code: result.status };
};

describe('CUDA', () => {
  it('is built when asked for and found', () => {
    expect(detect('cuda', { LCTX_CUDA: '1' }).out).toBe('1');
    expect(detect('home', { LCTX_CUDA: '1' }).out).toBe(toolkit);
    expect(detect('why', { LCTX_CUDA: '1' }).out).toBe('');
  });
  it('is left out by LCTX_CUDA=0', () => {
    expect(detect('cuda', { LCTX_CUDA: '0' }).out).toBe('0');
    expect(detect('archs', { LCTX_CUDA: '0' }).out).toBe('');
  });
  it('asked for without a toolkit is an error of one line that says what to do', () => {
    const { code, error } = detect('cuda', { LCTX_CUDA: '1', CUDA_HOME: join(dir, 'nowhere') });
    expect(code).toBe(1);
    expect(error).toMatch(/^\[lc\] LCTX_CUDA=1, but no CUDA toolkit was found in .*nowhere: install nvcc 13, or set CUDA_HOME/);
    expect(error.split('\n')).toHaveLength(1);
  });
});

describe('targets', () => {
  const archs = (list: string) => detect('archs', { LCTX_CUDA: '1', LCTX_CUDA_ARCHS: list });
  it('come from the list', () => expect(archs('80, 90a').out).toBe('80,90a'));
  it('of a release cover Ampere to Blackwell', () => expect(archs('release').out).toBe('80,90a,100,120'));
  it.each(['sm_80', '80;90', ',', '8.0'])("'%s' is refused", (list) => {
    const { code, error } = archs(list);
    expect(code).toBe(1);
    expect(error).toContain("expected a list like 80,90a or 'release'");
  });
  it("name the objects, so that another list never links yesterday's kernels", () => {
    const key = (env: Record<string, string>) => detect('key', { LCTX_CUDA: '1', ...env }).out;
    const one = key({ LCTX_CUDA_ARCHS: '80' });
    expect(one).toMatch(/^[0-9a-f]{12}$/);
    expect(key({ LCTX_CUDA_ARCHS: '80' })).toBe(one);
    expect(key({ LCTX_CUDA_ARCHS: '80,90a' })).not.toBe(one);
    tool(join(toolkit, 'bin/nvcc'), 'echo release 13.1, V13.1.20');
    expect(key({ LCTX_CUDA_ARCHS: '80' })).not.toBe(one);
  });
});

describe('what turbo hashes', () => {
  const toolchain = (env: Record<string, string>) => detect('toolchain', env).out;
  it('changes with the C++ compiler', () => {
    const before = toolchain({ LCTX_CUDA: '0' });
    expect(before).toContain('g++ 12.2.0');
    tool(join(dir, 'g++'), 'echo g++ 13.1.0');
    expect(toolchain({ LCTX_CUDA: '0' })).not.toBe(before);
  });
  it('sees through a wrapper', () => {
    tool(join(dir, 'ccache'), 'exec "$@"');
    expect(toolchain({ LCTX_CUDA: '0', CXX: `${join(dir, 'ccache')} ${join(dir, 'g++')}` })).toContain('g++ 13.1.0');
  });
  it('changes with nvcc and the targets, and not without CUDA', () => {
    const on = (list: string) => toolchain({ LCTX_CUDA: '1', LCTX_CUDA_ARCHS: list });
    const before = on('80');
    expect(before).toContain('archs 80');
    expect(on('80,90a')).not.toBe(before);
    tool(join(toolkit, 'bin/nvcc'), 'echo release 13.2, V13.2.1');
    expect(on('80')).not.toBe(before);
    expect(toolchain({ LCTX_CUDA: '0', LCTX_CUDA_ARCHS: '80' })).toBe(toolchain({ LCTX_CUDA: '0', LCTX_CUDA_ARCHS: '90a' }));
  });
});
