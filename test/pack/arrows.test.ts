/** Arrows point one way: trainer -> models, data, vram-probe -> the optimization packages -> tensor. What is imported is declared, and no more. */
import { readdirSync, readFileSync } from 'node:fs';
import { builtinModules } from 'node:module';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { packages, readManifest, root } from './install.js';

const layers = [
  ['tensor'],
  ['attention', 'chunked-ce', 'tiled-mlp', 'offload-ckpt', 'qlora'],
  ['models', 'data', 'vram-probe'],
  ['trainer'],
];
const layerOf = (name: string): number => layers.findIndex((layer) => layer.includes(name));

function filesOf(dir: string, pattern: RegExp): string[] {
  return readdirSync(dir, { withFileTypes: true, recursive: true })
    .filter((entry) => entry.isFile() && pattern.test(entry.name) && !/node_modules|\/build(\/|$)/.test(entry.parentPath))
    .map((entry) => join(entry.parentPath, entry.name));
}
const matches = (files: readonly string[], pattern: RegExp): string[] => [
  ...new Set(files.flatMap((file) => [...readFileSync(file, 'utf8').matchAll(pattern)].map((match) => match[1] as string))),
];
const specifiers = (name: string): string[] =>
  matches(
    filesOf(join(root, 'packages', name, 'src'), /\.ts$/),
    /(?:\bfrom|\bimport|\bimport\(|\brequire\(|\bresolve\(|\bcreateRequire\(import\.meta\.url\)\()\s*'([^'.][^']*)'/g,
  );
const packageOf = (specifier: string): string =>
  specifier
    .split('/')
    .slice(0, specifier.startsWith('@') ? 2 : 1)
    .join('/');

it('every package has its layer', () => {
  expect(layers.flat().sort()).toEqual([...packages].sort());
});

describe.each(packages)('%s', (name) => {
  const imported = new Set(
    specifiers(name)
      .filter((s) => !s.startsWith('node:') && !builtinModules.includes(s))
      .map(packageOf),
  );
  const { dependencies = {}, peerDependencies = {} } = readManifest(join(root, 'packages', name));
  const declared = new Set([...Object.keys(dependencies), ...Object.keys(peerDependencies)]);

  it('imports only packages of lower layers', () => {
    const ours = [...imported, ...declared].filter((other) => other.startsWith('@lc/')).map((other) => other.slice(4));
    expect(ours.filter((other) => layerOf(other) >= layerOf(name))).toEqual([]);
  });
  it('declares what it imports, and imports what it declares', () => {
    expect([...imported].sort()).toEqual([...declared].sort());
  });
  it('takes @lc/tensor from its user: one table in a process', () => {
    expect(dependencies).not.toHaveProperty('@lc/tensor');
  });
  it("includes no other package's native code", () => {
    let sources: string[];
    try {
      sources = filesOf(join(root, 'packages', name, 'native'), /\.(cc|cu|h|cuh)$/);
    } catch {
      return; // pure TypeScript
    }
    expect(matches(sources, /#include\s+"([^"]+)"/g).filter((include) => include.includes('..'))).toEqual([]);
  });
});
