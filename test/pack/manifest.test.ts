/** What a registry's page shows of a package, and what a package manager and a bundler decide by: package.json of every package that is published. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { repositoryFields } from '../../scripts/release/repository.mjs';
import { packages, root } from './install.js';

const read = (file: string) => JSON.parse(readFileSync(join(root, file), 'utf8')) as Record<string, unknown>;
const rootManifest = read('package.json');

describe.each(packages)('package.json of %s', (name) => {
  const manifest = read(`packages/${name}/package.json`);
  const native = existsSync(join(root, 'packages', name, 'native/binding.gyp'));

  it('says what the package is', () => {
    expect(manifest).toMatchObject({ name: `@lc/${name}`, license: 'Apache-2.0', type: 'module', publishConfig: { access: 'public' } });
    expect(manifest.description).toMatch(/^[A-Z].{20,120}[^.]$/);
    const keywords = manifest.keywords as string[];
    expect(new Set(keywords).size).toBe(keywords.length);
    expect(keywords).toEqual(expect.arrayContaining(['llm', 'fine-tuning']));
    expect(keywords.length).toBeGreaterThanOrEqual(6);
    for (const keyword of keywords) expect(keyword).toMatch(/^[a-z0-9-]+$/);
  });
  it('says where it runs', () => {
    expect(manifest.engines).toEqual({ node: (rootManifest.engines as { node: string }).node });
    // An addon is for one platform; TypeScript alone is for all, as far as what it imports is.
    expect([manifest.os, manifest.cpu, manifest.libc]).toEqual(
      native ? [['linux'], ['x64'], ['glibc']] : [undefined, undefined, undefined],
    );
    expect(manifest.preferUnplugged).toBe(native ? true : undefined); // a file in a zip cannot be loaded
  });
  it('says what is published, and that importing it does nothing', () => {
    expect(manifest.files).toEqual(native ? ['dist', 'prebuilds'] : ['dist']);
    expect(manifest.sideEffects).toBe(false);
  });
  it('has repository, homepage and bugs from package.json at the root', () => {
    const { repository, homepage, bugs } = manifest;
    expect({ repository, homepage, bugs }).toEqual({
      repository: undefined,
      homepage: undefined,
      bugs: undefined,
      ...repositoryFields(rootManifest, name),
    });
  });
});

it('repository fields lead to the folder of the package', () => {
  const want = {
    homepage: 'https://host.example/owner/lc/tree/main/packages/data#readme',
    bugs: { url: 'https://host.example/owner/lc/issues' },
    repository: { type: 'git', url: 'git+https://host.example/owner/lc.git', directory: 'packages/data' },
  };
  expect(repositoryFields({ repository: { type: 'git', url: 'git+https://host.example/owner/lc.git' } }, 'data')).toEqual(want);
  expect(repositoryFields({ repository: 'https://host.example/owner/lc' }, 'data')).toEqual(want);
  expect(repositoryFields({}, 'data')).toEqual({});
});
