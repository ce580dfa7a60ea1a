/** Packages at work in threads, and processes that end in the middle of it. Everything runs as a user's program does: plain node, built packages. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';

const here = dirname(fileURLToPath(import.meta.url));
if (!existsSync(join(here, '../../packages/models/dist/index.js'))) throw new Error('not built; npm run setup first');

interface Ended {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}
const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(NODE_|VITEST)/.test(name)));
function program(...args: string[]): Promise<Ended> {
  return new Promise((resolve, reject) => {
    // A small young generation: RSS then shows what is kept, not how far V8 lets its heap grow.
    const child = spawn(process.execPath, ['--expose-gc', '--max-semi-space-size=2', join(here, 'program.mjs'), ...args], {
      env,
      cwd: here,
    });
    const out: Ended = { code: null, signal: null, stdout: '', stderr: '' };
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      out.stdout += text;
    });
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      out.stderr += text;
    });
    child.on('error', reject);
    child.on('close', (code, signal) => resolve({ ...out, code, signal }));
  });
}
async function answerOf<T>(...args: string[]): Promise<T> {
  const { stdout, stderr, code, signal } = await program(...args);
  expect({ code, signal, stderr: code === 0 ? '' : stderr }).toEqual({ code: 0, signal: null, stderr: '' });
  return JSON.parse(stdout) as T;
}

it('every package works in a thread, in four at once, and gives the bits that it gives alone', async () => {
  const {
    here: alone,
    threads,
    live,
  } = await answerOf<{
    here: Record<string, unknown[]>;
    threads: object[];
    live: number;
  }>('several');
  expect(Object.keys(alone)).toEqual(['tensor', 'attention', 'chunked-ce', 'tiled-mlp', 'qlora', 'models']);
  expect(alone.tensor?.[0]).toMatch(/^\d+ true ERR_LC_OUT_OF_MEMORY$/);
  expect(threads).toEqual([alone, alone, alone, alone]);
  expect(live).toBe(0);
});

it('threads that are terminated in the middle of their work end at once and leave no memory behind', async () => {
  expect(await answerOf('terminate')).toEqual({ codes: [1], live: 0 });
});

it('a thread that ends with undisposed tensors, borrowed memory and DLPack exports gives all of it back', async () => {
  expect(await answerOf('abandon')).toEqual({ code: 0, live: 0 });
});

it.each([
  ['in the middle of a step', 'step', 7],
  ['while threads work', 'threads', 7],
  ['with undisposed tensors', 'idle', 0],
] as const)('the process exits %s with its own code', async (_name, how, code) => {
  for (let i = 0; i < 2; i++) expect(await program('exit', how)).toEqual({ code, signal: null, stdout: '', stderr: '' });
});

it('memory is shared between threads by a DLPack address; the last to dispose frees it', async () => {
  expect(await answerOf('share')).toEqual({ seen: 2, between: 4000, sum: 2000, live: 0 });
});

// 10,000 cycles take 160 MB of memory and more in all, and a kept struct of 100 bytes each would be 0.6 MB in the last three rounds.
it.each(['tensor', 'data', 'typed array', 'dlpack', 'workspace', 'work', 'session'])(
  'create and dispose, over and over: %s',
  async (kind) => {
    const { resident, live, leaks } = await answerOf<{ resident: number[]; live: number; leaks: number }>('cycles', kind);
    expect({ live, leaks }).toEqual({ live: 0, leaks: 0 });
    const [, second = 0, ...later] = resident;
    expect(Math.min(...later) - second, `resident KiB by round: ${resident}`).toBeLessThan(kind === 'session' ? 8192 : 2048);
  },
);

it('forgotten tensors are reported once, by label; the memory comes back', async () => {
  const { warnings, leaks, before, live } = await answerOf<{ warnings: object[]; leaks: object[]; before: number; live: number }>('leak');
  expect(warnings).toEqual([
    { code: 'LC_LEAK', message: expect.stringMatching(/^a tensor 'forgotten' of 4000 bytes was garbage-collected without dispose\(\)/) },
  ]);
  expect(leaks).toEqual([
    { label: 'forgotten', nbytes: 4000 },
    { label: 'forgotten', nbytes: 4000 },
  ]);
  expect({ before, live }).toEqual({ before: 8000, live: 0 });
});
