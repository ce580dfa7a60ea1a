/** turbo's cache on a copy of the workspace whose scripts only write a file: a second run does nothing, and brings deleted outputs back. */
import { expect, it } from 'vitest';
import { native, TurboCopy } from './workspace.js';

it('a second run is a full hit, and restores deleted outputs', () => {
  using copy = new TurboCopy();
  const output = { build: 'dist/index.js', 'build:native': 'prebuilds/linux-x64/addon.node' };
  const write = (file: string) => `node -e "fs.mkdirSync(path.dirname('${file}'),{recursive:true});fs.writeFileSync('${file}','x')"`;
  copy.stubScripts((task) => write(output[task as keyof typeof output]));
  copy.run(['build']);
  expect([...copy.tasks().values()].filter((task) => task.cache.status !== 'HIT').map((task) => task.taskId)).toEqual([]);
  for (const name of native) copy.remove(`packages/${name}/prebuilds`);
  copy.remove('packages/data/dist');
  expect(copy.run(['build'])).toContain('FULL TURBO');
  for (const name of native) expect(copy.exists(`packages/${name}/prebuilds/linux-x64/addon.node`)).toBe(true);
  expect(copy.exists('packages/data/dist/index.js')).toBe(true);
});

it('an addon that changed is built again with the packages that ship with it, and no other', () => {
  using copy = new TurboCopy();
  const before = copy.tasks();
  copy.append('packages/attention/native/addon.cc');
  const again = [...copy.tasks()].filter(([id, task]) => task.hash !== before.get(id)?.hash).map(([id]) => id);
  expect(again.sort()).toEqual(['attention#build', 'attention#build:native', 'models#build', 'trainer#build', 'vram-probe#build']);
});
