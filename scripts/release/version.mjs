// `npm run version`: takes the changesets up. The examples are no part of the workspace, so that changesets does not know of them.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { bin, root, run } from '../lib.mjs';
import { setExampleVersions } from './examples.mjs';
import { setRepository } from './repository.mjs';

run(bin('changeset'), ['version']);
setExampleVersions(root, JSON.parse(readFileSync(join(root, 'packages/tensor/package.json'), 'utf8')).version);
setRepository(root);
