// POST / into PostgreSQL with Fastify and postgres: `node fastify.js gathered|each PROCESSES`.
// The database is $DATABASE_URL.
'use strict'
const cluster = require('node:cluster')
const Fastify = require('fastify')
const postgres = require('postgres')

const INTEGER = { type: 'integer', minimum: -(2 ** 53) + 1, maximum: 2 ** 53 - 1 }
const EVENT = {
  type: 'object',
  required: ['event_name', 'user_id', 'timestamp', 'message'],
  properties: {
    event_name: { const: 'crash_report' },
    user_id: INTEGER,
    timestamp: INTEGER,
    message: { type: 'string', format: 'storable' }
  }
}
const BODY = { anyOf: [EVENT, { type: 'array', minItems: 1, items: EVENT }] }
// PostgreSQL would refuse the whole statement
const FORMATS = { storable: text => !text.includes('\0') }
const ANSWER = '{"status_code": 0, "status_message": "ok"}'

// What arrives while a statement is under way goes into the next one; a batch is one of its own.
class Gathered {
  constructor (url) {
    this.sql = postgres(url, { max: 2 })
    this.next = { events: [], replies: [] }
    this.writing = false
  }

  add (body, reply) {
    if (Array.isArray(body)) return insert(this.sql, body).then(() => answer(reply))
    this.next.events.push(body)
    this.next.replies.push(reply)
    if (!this.writing) this.write()
  }

  async write () {
    this.writing = true
    while (this.next.events.length > 0) {
      const { events, replies } = this.next
      this.next = { events: [], replies: [] }
      try {
        await insert(this.sql, events)
        replies.forEach(answer)
      } catch (error) {
        for (const reply of replies) reply.send(error)
      }
    }
    this.writing = false
  }
}

// One statement a POST, over a pool of connections.
class Each {
  constructor (url) {
    this.sql = postgres(url, { max: 10 })
  }

  async add (body, reply) {
    if (Array.isArray(body)) {
      await insert(this.sql, body)
    } else {
      await this.sql`
        insert into crash_report (user_id, "timestamp", message, received_at)
        values (${body.user_id}, ${body.timestamp}, ${body.message}, now())`
    }
    answer(reply)
  }
}

// Arrays are written out here: the library's own way costs a sixth of the rate of batches.
function insert (sql, events) {
  const userIds = events.map(event => event.user_id).join()
  const timestamps = events.map(event => event.timestamp).join()
  const messages = events.map(event => quoted(event.message)).join()
  return sql`
    insert into crash_report (user_id, "timestamp", message, received_at)
    select *, now() from unnest(${`{${userIds}}`}::text::bigint[],
      ${`{${timestamps}}`}::text::bigint[], ${`{${messages}}`}::text::text[])`
}

function quoted (text) {
  return `"${/["\\]/.test(text) ? text.replace(/["\\]/g, '\\$&') : text}"`
}

function answer (reply) {
  reply.header('content-type', 'application/json').send(ANSWER)
}

async function serve (how) {
  const writer = new { gathered: Gathered, each: Each }[how](process.env.DATABASE_URL)
  const app = Fastify({
    logger: false,
    bodyLimit: 8 * 1024 * 1024,
    ajv: { customOptions: { coerceTypes: false, removeAdditional: false, formats: FORMATS } }
  })
  app.removeAllContentTypeParsers() // JSON whatever the header says, as the others take it
  app.addContentTypeParser('*', { parseAs: 'string' }, parse)
  app.post('/', { schema: { body: BODY } }, (request, reply) => writer.add(request.body, reply))
  const address = await app.listen({ host: '127.0.0.1', port: 0, backlog: 1024 })
  console.log(JSON.stringify({ event: 'listening', address }))
}

function parse (request, body, done) {
  try {
    done(null, JSON.parse(body))
  } catch (error) {
    error.statusCode = 400
    done(error)
  }
}

const [how, processes] = process.argv.slice(2)
if (cluster.isPrimary && processes > 1) {
  for (let i = 0; i < processes; i++) cluster.fork()
} else {
  serve(how)
}
