// nginx and Caddy as they are packaged, with what docs/gateway.md shows, in front of
// an upstream that guards nothing.
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import http from 'node:http';
import { userInfo } from 'node:os';
import path from 'node:path';
import { Process, freeAddress } from './process.mjs';
import { startEnforcer } from './enforcer.mjs';

const manual = readFileSync(new URL('../docs/gateway.md', import.meta.url), 'utf8');

/** The manual's snippet in a language, with the addresses of this run. */
function snippet(language, addresses) {
  const [, text] = manual.split(`\n\`\`\`${language}\n`, 2);
  assert.ok(text, `docs/gateway.md has no ${language}`);
  let out = text.slice(0, text.indexOf('\n```') + 1);
  for (const [shown, real] of Object.entries(addresses)) {
    assert.ok(out.includes(shown), `the manual's ${language} does not have ${shown}`);
    out = out.replaceAll(shown, real);
  }
  return out;
}

const fronts = [
  {
    name: 'nginx', dialect: 'x-original', down: 500,
    start: (dir, address, upstream, authz) => new Process(dir, {
      'nginx.conf': `daemon off;
worker_processes 1;
pid nginx.pid;
${userInfo().uid === 0 ? `user ${userInfo().username};` : ''}
events { worker_connections 256; }
http {
  access_log log;
  ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(what => `${what}_temp_path ${what};`).join(' ')}
  server {
    listen ${address};
${snippet('nginx', { '127.0.0.1:9000': upstream, '127.0.0.1:9192': authz })}
  }
}
`,
    }, 'nginx', ['-p', dir, '-c', path.join(dir, 'nginx.conf'), '-e', 'stderr']),
  },
  {
    name: 'Caddy', dialect: 'x-forwarded', down: 502,
    start: (dir, address, upstream, authz) => new Process(dir, {
      Caddyfile: `{
    admin off
    log default {
        level DEBUG
    }
}
${snippet('caddyfile', {
    'tools.example {': `http://tools.example:${address.split(':')[1]} {\n    bind 127.0.0.1\n    log`,
    '127.0.0.1:9000': upstream, '127.0.0.1:9192': authz,
  })}`,
    }, 'caddy', ['run', '--config', 'Caddyfile', '--adapter', 'caddyfile'], { HOME: dir, XDG_DATA_HOME: dir, XDG_CONFIG_HOME: dir }),
  },
];

/** Starts each behind its enforcer, and runs its cases. */
export async function runFronts(check, run) {
  const downs = []; // once nothing waits for these enforcers any more
  for (const front of fronts) {
    const name = front.name.toLowerCase();
    const [address, authz] = [await freeAddress(), await freeAddress()];
    const enforcer = await startEnforcer(run, `authz-${name}`, 'authz', `routes: [{name: tools, protocol: http, path: /mcp, resource: "https://tools.example/mcp"}]
authz: {http: {listen: "${authz}"}, forward_headers: ${front.dialect}}
`);
    const program = front.start(path.join(run.work, name), address, new URL(run.at.mirror).host, authz);
    run.processes.push(program);
    await program.ready(`http://${address}/`);
    const { down, ...running } = cases(front, address, run, enforcer);
    for (const [what, test] of Object.entries(running)) {
      await check(`${front.name} before enforcer authz: ${what}`, test);
    }
    downs.push([`${front.name} before enforcer authz: denies when the enforcer is down`, down]);
  }
  for (const [what, test] of downs) await check(what, test);
}

function cases(front, address, { control }, enforcer) {
  const caller = async () => {
    const [user, session] = [`ann-${randomUUID()}`, randomUUID()];
    return { user, session, token: await control('token', { user, session }), revoke: () => control('revoke', { session }) };
  };
  const ask = async ({ token } = {}, { method = 'GET', uri = '/mcp', headers = {}, body = '' } = {}) => {
    const [host, port] = address.split(':');
    const req = http.request({
      host, port, method, path: uri, agent: false,
      headers: { Host: `tools.example:${port}`, ...headers, ...(token ? { Authorization: `Bearer ${token}` } : {}), ...(body ? { 'Content-Length': Buffer.byteLength(body) } : {}) },
    });
    req.end(body);
    const [res] = await once(req, 'response');
    let text = '';
    for await (const chunk of res.setEncoding('utf8')) text += chunk;
    return { status: res.statusCode, challenge: res.headers['www-authenticate'], text };
  };
  /** What the upstream was sent. */
  const passes = async (who, request) => {
    const res = await ask(who, request);
    assert.equal(res.status, 200, res.text);
    return JSON.parse(res.text);
  };
  /** What was answered in place of the upstream. */
  const stopped = async (status, who, request) => {
    const before = await control('mirrored');
    const res = await ask(who, request);
    assert.equal(res.status, status, res.text);
    assert.equal(await control('mirrored'), before, 'the upstream was asked');
    return res;
  };
  /** What names the caller; an empty header says nothing. */
  const named = ({ header }) => Object.fromEntries(Object.entries(header).filter(([name, values]) => /^interlock[-_]/i.test(name) && values.join('') !== ''));
  const names = ({ user, session }) => ({
    'Interlock-Tenant': ['default'], 'Interlock-Issuer': ['https://interop.example'], 'Interlock-Subject': [user],
    'Interlock-Session': [session], 'Interlock-Client': ['interop'],
  });

  return {
    'allows, and names the caller': async () => {
      const ann = await caller();
      const seen = await passes(ann, { method: 'POST', uri: '/mcp?a=%20b', body: '{"some":"body"}' });
      assert.deepEqual({ method: seen.method, uri: seen.uri, body: seen.body }, { method: 'POST', uri: '/mcp?a=%20b', body: '{"some":"body"}' });
      assert.deepEqual(named(seen), names(ann));
      assert.equal(seen.header.Authorization, undefined);
    },
    'takes out what a client says that it is': async () => {
      const ann = await caller();
      const headers = { 'interlock-actors': 'spiffe://corp/agent/root' }; // which the enforcer does not set for her
      for (const what of ['Tenant', 'Issuer', 'Subject', 'Session', 'Client']) headers[`Interlock-${what}`] = ['root', 'other'];
      for (const what of ['Subject', 'Actors']) headers[`Interlock_${what}`] = 'root';
      headers.interlock_session = 'root';
      assert.deepEqual(named(await passes(ann, { headers })), names(ann));
    },
    'denies without a token': async () => {
      assert.match((await stopped(401)).challenge, /^Bearer resource_metadata="https:/);
      assert.match((await stopped(401, { token: 'garbage' })).challenge, /error="invalid_token"/);
    },
    'denies by what is asked for, not by what a client says of it': async () => {
      const ann = await caller();
      const value = `GET /mcp/${front.name}`;
      const uri = `/mcp/${front.name}`;
      await passes(ann, { uri });
      await control('suspend', { kind: 'tool', value });
      await stopped(403, ann, { uri });
      const headers = {};
      for (const dialect of ['X-Original', 'X-Forwarded']) Object.assign(headers, { [`${dialect}-Method`]: 'POST', [`${dialect}-Uri`]: '/mcp/other', [`${dialect}-Host`]: 'other.example' });
      await stopped(403, ann, { uri, headers });
      await passes(ann, { uri: '/mcp/other' });
      await control('resume', { kind: 'tool', value });
      await passes(ann, { uri });
    },
    'denies from the revocation on, and says why': async () => {
      const [one, bystander] = [await caller(), await caller()];
      await passes(one);
      await one.revoke();
      const { challenge } = await stopped(401, one);
      assert.match(challenge, /^Bearer error="invalid_token", error_description="denied: revoked: stolen-token/);
      assert.match(challenge, /resource_metadata="https:/);
      await passes(bystander);
    },
    down: async () => {
      const ann = await caller();
      await passes(ann);
      assert.equal(await enforcer.stop(), 0);
      await stopped(front.down, ann);
      await stopped(front.down);
    },
  };
}
