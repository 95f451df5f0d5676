// Package broker runs the bus inside the Session Authority: a nats-server with
// JetStream on file storage, and the rights on it.
//
// An enforcer may publish its receipts, its clock requests and reads of the two
// streams, and may hear the log, the heartbeats, the key sets and its own inbox;
// nothing else. It has no consumer and no stream rights at all:
// with them a hostile one can have stored messages delivered onto subjects that
// it may not publish to.
//
// The same rights for an external cluster are printed by ServerConfig.
package broker
