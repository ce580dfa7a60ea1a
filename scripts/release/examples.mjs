// The examples of examples/ as a user has them: a copy of the folder, packages from the registry, the scripts of its package.json.
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { Consumer } from './consumer.mjs';

const expect = (true_, what) => {
  if (!true_) throw new Error(what);
};
const numbers = (output, pattern) => [...output.matchAll(pattern)].map((match) => Number(match[1]));

/** Scripts in order, and what is wrong with the output of one that ended well. `compiler`: it may find one; nothing else here can. */
const SCRIPTS = {
  'chunked-ce': {
    build: { compiler: true }, // the addon that stands for another library
    typecheck: {},
    start: {
      check(output) {
        const losses = numbers(output, /loss ([\d.]+)/g);
        expect(losses.at(-1) < 2 && losses[0] > 7, 'the loss did not fall from above 7 to below 2');
        expect(output.includes('every export was given back'), 'it did not come to its end');
      },
    },
  },
  'custom-trainer': {
    typecheck: {},
    start: {
      check(output) {
        const [before, after] = numbers(output, /held-out loss \w+: ([\d.]+)/g);
        expect(before > 4 && after < 2.3, 'the held-out loss did not fall from above 4 to below 2.3');
      },
    },
  },
  service: {
    typecheck: {},
    test: { check: (output) => expect(/\bpass 4\b/.test(output) && /\bskipped 0\b/.test(output), 'not all of its tests ran') },
  },
};

const manifestOf = (tree, name) => JSON.parse(readFileSync(join(tree, 'examples', name, 'package.json'), 'utf8'));
/** Examples that name published versions; quickstart is part of the workspace. */
const published = (tree) =>
  readdirSync(join(tree, 'examples')).filter(
    (name) =>
      existsSync(join(tree, 'examples', name, 'package.json')) &&
      !Object.values(manifestOf(tree, name).dependencies).some((range) => range.startsWith('workspace:')),
  );

/** Makes the examples name a version that is about to be published. */
export function setExampleVersions(tree, version) {
  for (const name of published(tree)) {
    const manifest = manifestOf(tree, name);
    for (const other of Object.keys(manifest.dependencies)) if (other.startsWith('@lc/')) manifest.dependencies[other] = `^${version}`;
    writeFileSync(join(tree, 'examples', name, 'package.json'), `${JSON.stringify(manifest, null, 2)}\n`);
  }
}

/** Runs all of them by npm; gives a row for each, and tells problems. */
export async function runExamples({ tree, home, node, registry, programs }, tell) {
  const names = published(tree);
  for (const name of names) if (!SCRIPTS[name]) tell(`examples/${name}: scripts/release/examples.mjs does not know how to run it`);
  const parent = join(home, 'examples', node.major);
  mkdirSync(parent, { recursive: true });
  cpSync(join(tree, 'examples/quickstart/tiny-gpt-oss'), join(parent, 'quickstart/tiny-gpt-oss'), { recursive: true });

  const rows = [];
  for (const name of names.filter((name) => SCRIPTS[name])) {
    const row = { Node: node.major, example: name };
    rows.push(row);
    try {
      const user = new Consumer({
        home: parent,
        name,
        project: join(tree, 'examples', name),
        node: node.program,
        manager: 'npm',
        registry,
        programs,
      });
      row.install = `${((await user.add([])) / 1e3).toFixed(1)} s`;
      for (const [script, { compiler, check }] of Object.entries(SCRIPTS[name])) {
        row[script] = 'failed';
        const { output, ms } = await user.run([programs.npm, 'run', script], compiler ? compiling(user, node) : {});
        try {
          check?.(output);
        } catch (error) {
          throw new Error(`npm run ${script}: ${error.message}:\n${output}`);
        }
        row[script] = `${(ms / 1e3).toFixed(1)} s`;
      }
    } catch (error) {
      tell(`Node ${node.major}: examples/${name}: ${error.message}`);
    }
  }
  return rows;
}

/** This machine's compiler; node's headers from beside node, as node-gyp would otherwise download them. */
function compiling(user, node) {
  const prefix = join(dirname(node.program), '..');
  return {
    PATH: `${user.env.PATH}:${process.env.PATH}`,
    ...(existsSync(join(prefix, 'include/node/node_api.h')) ? { npm_config_nodedir: prefix } : {}),
  };
}
