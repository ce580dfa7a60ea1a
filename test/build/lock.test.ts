/** One build of a package at a time: native/lock.cjs. */
import { execFile, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, expect, it } from 'vitest';

const lock = new URL('../../native/lock.cjs', import.meta.url).pathname;
const { locked } = createRequire(import.meta.url)(lock) as { locked<T>(file: string, work: () => T): T };
let dir: string;
beforeAll(() => {
  dir = mkdtempSync(join(tmpdir(), 'lc-lock-'));
});
afterAll(() => rmSync(dir, { recursive: true, force: true }));

it('processes take turns', async () => {
  const [file, count] = [join(dir, 'turns'), join(dir, 'count')];
  writeFileSync(count, '0');
  const script = `
    const fs = require('node:fs');
    const { locked } = require(${JSON.stringify(lock)});
    for (let i = 0; i < 20; i++) locked(${JSON.stringify(file)}, () => {
      const n = Number(fs.readFileSync(${JSON.stringify(count)}, 'utf8'));
      const until = Date.now() + 2;
      while (Date.now() < until);
      fs.writeFileSync(${JSON.stringify(count)}, String(n + 1));
    });`;
  const run = promisify(execFile);
  await Promise.all(Array.from({ length: 4 }, () => run(process.execPath, ['-e', script])));
  expect(readFileSync(count, 'utf8')).toBe('80');
  expect(existsSync(file)).toBe(false);
});

it('the lock of a process that died does not count, and an empty one only while it is new', () => {
  const file = join(dir, 'stale');
  const { pid } = spawnSync(process.execPath, ['-e', '']);
  writeFileSync(file, String(pid));
  expect(locked(file, () => readFileSync(file, 'utf8'))).toBe(String(process.pid));
  writeFileSync(file, '');
  utimesSync(file, 0, 0);
  expect(locked(file, () => 7)).toBe(7);
});

it('is given back when the work throws', () => {
  const file = join(dir, 'throws');
  expect(() =>
    locked(file, () => {
      throw new Error('no');
    }),
  ).toThrow('no');
  expect(existsSync(file)).toBe(false);
});
