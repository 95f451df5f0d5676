// Runs everything against one server process and counts. See ./run.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import path from 'node:path';
import { inspect } from 'node:util';
import { stacks } from './clients.mjs';
import { agent, agents } from './agents.mjs';
import { compareScores } from './conformance.mjs';
import { startEnforcer } from './enforcer.mjs';
import { runFronts } from './fronts.mjs';
import { freeAddress } from './process.mjs';

const work = process.argv[2];
let passed = 0;
let failed = 0;

/** Runs one check; it fails by throwing. */
async function check(name, run) {
  const began = performance.now();
  let timer;
  try {
    await Promise.race([
      run(),
      new Promise((_, reject) => { timer = setTimeout(() => reject(new Error('no end after 300 s')), 300_000); }),
    ]);
    passed++;
    console.log(`ok    ${name} (${Math.round(performance.now() - began)} ms)`);
  } catch (err) {
    failed++;
    console.log(`FAIL  ${name}: ${inspect(err)}`);
  } finally {
    clearTimeout(timer);
  }
}

async function checkAll(stacks, how, url, ...rest) {
  for (const stack of stacks) {
    for (const [name, run] of Object.entries(stack.cases(url, ...rest))) {
      await check(`${stack.name}${how}: ${name}`, run);
    }
  }
}

/** Puts `enforcer proxy` before the upstreams that guard nothing. */
async function startProxy(run) {
  const listen = await freeAddress();
  const enforcer = await startEnforcer(run, 'proxy', 'proxy', `routes:
  - name: tools
    path: /mcp
    resource: https://tools.example/mcp
    upstream: {url: "${run.at.plain}"}
  - name: worker
    protocol: a2a
    path: /worker
    resource: http://${listen}/worker # which its card says, and the client uses
    audience: https://tools.example/mcp
    resource_metadata: https://tools.example/.well-known/oauth-protected-resource
    agent_card: {upstream: "${run.at.plain_a2a}/.well-known/agent-card.json", agent: "${agent}", tenant: default}
    upstream: {url: "${run.at.plain_a2a}"}
proxy: {listeners: [{listen: "${listen}"}]}
`);
  return { enforcer, tools: `http://${listen}/mcp`, card: `http://${listen}/worker/.well-known/agent-card.json` };
}

const server = spawn(path.join(work, 'bin', 'server'), { stdio: ['pipe', 'pipe', 'inherit'] });
const ended = once(server, 'exit');
const processes = [];
for (const [signal, code] of [['SIGINT', 130], ['SIGTERM', 143]]) {
  process.once(signal, () => {
    for (const p of processes) p.child.kill('SIGTERM');
    process.exit(code); // the server ends with our end of its input
  });
}
try {
  const [line] = await once(createInterface({ input: server.stdout }), 'line');
  const at = JSON.parse(line);
  const tokens = [];
  const control = async (what, body = {}) => {
    const res = await fetch(`${at.control}/${what}`, { method: 'POST', body: JSON.stringify(body) });
    if (!res.ok) throw new Error(`control ${what}: ${res.status} ${await res.text()}`);
    const answer = await res.json();
    if (what === 'token') tokens.push(answer);
    return answer;
  };
  const run = { work, at, control, processes };
  await checkAll(stacks, '', at.guarded, control);
  await checkAll(agents, '', at.a2a, control);
  const proxy = await startProxy(run);
  await checkAll(stacks, ' through enforcer proxy', proxy.tools, control);
  await checkAll(agents, ' through enforcer proxy', proxy.card, control, true);
  await runFronts(check, run);
  await check('enforcer proxy ends in order', async () => assert.equal(await proxy.enforcer.stop(), 0));
  await check('no token is in a log', async () => {
    assert.ok(tokens.length > 0);
    for (const p of processes) {
      const log = p.log();
      for (const t of tokens) assert.ok(!log.includes(t.split('.')[2]), `one is in ${p.logFile}`);
    }
  });
  await control('release');
  await compareScores(check, at, work);
} catch (err) {
  failed++;
  console.log(`FAIL  runner: ${err?.stack ?? err}`);
} finally {
  await Promise.all(processes.map(p => p.stop()));
  server.stdin.end();
}
const [code] = await ended;
if (code !== 0) {
  failed++;
  console.log(`FAIL  the server ended with ${code}`);
}
console.log(`interop: ${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 && passed > 0 ? 0 : 1;
