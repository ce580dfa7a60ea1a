// Where the code can be read: `repository` of package.json at the root is the only place that says so. `npm run version` writes it into the packages.
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** https://host/owner/name, or null while the root names none. */
export function repositoryUrl(rootManifest) {
  const { repository } = rootManifest;
  const url = typeof repository === 'string' ? repository : repository?.url;
  return url ? url.replace(/^git\+/, '').replace(/\.git$/, '') : null;
}

/** What package.json of a published package says of it; nothing while the root names none. */
export function repositoryFields(rootManifest, name) {
  const url = repositoryUrl(rootManifest);
  if (!url) return {};
  const directory = `packages/${name}`;
  return {
    homepage: `${url}/tree/main/${directory}#readme`,
    bugs: { url: `${url}/issues` },
    repository: { type: 'git', url: `git+${url}.git`, directory },
  };
}

/** Brings all packages of a tree in line; says so where a release would go out without. */
export function setRepository(tree) {
  const read = (file) => JSON.parse(readFileSync(file, 'utf8'));
  const root = read(join(tree, 'package.json'));
  for (const name of readdirSync(join(tree, 'packages'))) {
    const file = join(tree, 'packages', name, 'package.json');
    if (!existsSync(file)) continue;
    const { homepage, bugs, repository, ...rest } = read(file);
    const fields = repositoryFields(root, name);
    // After `license`, where npm's own order has them.
    const entries = Object.entries(rest).flatMap(([key, value]) =>
      key === 'license' ? [[key, value], ...Object.entries(fields)] : [[key, value]],
    );
    writeFileSync(file, `${JSON.stringify(Object.fromEntries(entries), null, 2)}\n`);
  }
  if (!repositoryUrl(root))
    console.warn('[lc] package.json at the root names no `repository`: packages would be published without repository, homepage and bugs');
}
