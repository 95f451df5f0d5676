// Package proposal keeps what one commander has proposed and another must approve,
// where every authority on the bus finds it and a restart does not lose it.
//
// A proposal is a value of the bucket that authorities share, sealed and
// authenticated under a key of theirs, so that the bus can neither read nor alter
// it. It is changed by expected revision only, so that of two who approve it, on
// whatever authorities, one does.
package proposal

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/interlock-fabric/interlock/pkg/authority"
	"github.com/interlock-fabric/interlock/pkg/natsfeed"
)

const (
	// MaxProposals bounds what is kept; what ended first gives way. Together with
	// the roster it stays below the size of the bucket.
	MaxProposals = 48
	// MaxOpen bounds the open proposals of one principal.
	MaxOpen = 8
	// Keep is how long what has ended is at least tried to be kept.
	Keep = 24 * time.Hour

	prefix   = "proposal."
	maxValue = 4 << 10
	tries    = 8
)

var (
	// ErrUnknown: there is no such proposal.
	ErrUnknown = errors.New("proposal: there is none of that id")
	// ErrConflict: another changed it meanwhile.
	ErrConflict = errors.New("proposal: another was faster")
	// ErrFull: too many are open.
	ErrFull = errors.New("proposal: too many are open")
	// ErrTooLarge: what is asked for does not fit.
	ErrTooLarge = errors.New("proposal: too large: name fewer targets and exemptions")
)

// Record is a proposal as it is kept.
type Record struct {
	authority.Proposal
	revision uint64
	slot     int
}

// Store is where proposals are. It is safe for concurrent use.
type Store struct {
	kv   jetstream.KeyValue
	aead cipher.AEAD
}

// Open returns the store. secret is what all authorities share and nobody else has.
// The bucket must exist; ctx bounds the opening.
func Open(ctx context.Context, nc *nats.Conn, secret []byte) (*Store, error) {
	key, err := hkdf.Key(sha256.New, secret, nil, "interlock proposals 1", 32)
	if err != nil {
		return nil, fmt.Errorf("proposal: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("proposal: %w", err)
	}
	s := &Store{}
	if s.aead, err = cipher.NewGCMWithRandomNonce(block); err != nil {
		return nil, fmt.Errorf("proposal: %w", err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("proposal: %w", err)
	}
	if s.kv, err = js.KeyValue(ctx, natsfeed.LeaseBucket); err != nil {
		return nil, fmt.Errorf("proposal: bucket: %w", err)
	}
	return s, nil
}

func keyOf(slot int) string { return fmt.Sprintf("%s%02d", prefix, slot) }

// List returns what is kept, the newest first. What cannot be opened is as if it
// were not there: nobody's word stands for it.
func (s *Store) List(ctx context.Context) ([]Record, error) {
	all, _, err := s.load(ctx)
	slices.SortStableFunc(all, func(a, b Record) int { return b.At.Compare(a.At) })
	return all, err
}

// load returns what is kept, and the revisions of the slots that have something.
func (s *Store) load(ctx context.Context) (all []Record, revisions []uint64, err error) {
	// Slots are filled in order, and never emptied.
	for slot := range MaxProposals {
		e, err := s.kv.Get(ctx, keyOf(slot))
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			break
		}
		if err != nil {
			return nil, nil, fmt.Errorf("proposal: %w", err)
		}
		revisions = append(revisions, e.Revision())
		if r, ok := s.open(slot, e.Value()); ok {
			r.revision = e.Revision()
			all = append(all, r)
		}
	}
	return all, revisions, nil
}

func (s *Store) open(slot int, value []byte) (r Record, ok bool) {
	b, err := s.aead.Open(nil, nil, value, []byte(keyOf(slot)))
	if err != nil || json.Unmarshal(b, &r.Proposal) != nil {
		return Record{}, false
	}
	r.slot = slot
	return r, true
}

func (s *Store) seal(r *Record) ([]byte, error) {
	b, err := json.Marshal(&r.Proposal)
	if err != nil {
		return nil, fmt.Errorf("proposal: %w", err)
	}
	v := s.aead.Seal(nil, nil, b, []byte(keyOf(r.slot))) //nolint:gosec // this AEAD makes its nonces itself
	if len(v) > maxValue {
		return nil, ErrTooLarge
	}
	return v, nil
}

// Add keeps a proposal and gives it its id.
func (s *Store) Add(ctx context.Context, p authority.Proposal, now time.Time) (*Record, error) {
	for range tries {
		all, revisions, err := s.load(ctx)
		if err != nil {
			return nil, err
		}
		r := &Record{Proposal: p, slot: len(revisions)}
		open := 0
		taken := make(map[int]*Record, len(all))
		for i := range all {
			taken[all[i].slot] = &all[i]
			if all[i].Open(now) && all[i].By == p.By {
				open++
			}
		}
		if open >= MaxOpen && p.State == authority.ProposalOpen {
			return nil, fmt.Errorf("%w: %d of yours", ErrFull, open)
		}
		if r.slot == MaxProposals {
			// The one that ended first, or that nobody can read, gives way.
			var oldest *Record
			for slot := range revisions {
				o := taken[slot]
				if o == nil {
					oldest, r.slot = nil, slot
					break
				}
				if !o.Open(now) && (oldest == nil || o.At.Before(oldest.At)) {
					oldest, r.slot = o, slot
				}
			}
			if r.slot == MaxProposals {
				return nil, ErrFull
			}
		}
		r.ID = fmt.Sprintf("p%02d-%s", r.slot, strings.ToLower(rand.Text()[:6]))
		v, err := s.seal(r)
		if err != nil {
			return nil, err
		}
		if r.slot == len(revisions) {
			r.revision, err = s.kv.Create(ctx, keyOf(r.slot), v)
		} else {
			r.revision, err = s.kv.Update(ctx, keyOf(r.slot), v, revisions[r.slot])
		}
		if err == nil {
			return r, nil
		}
		if !conflict(err) {
			return nil, fmt.Errorf("proposal: %w", err)
		}
	}
	return nil, ErrConflict
}

// Find returns the proposal of an id. The error wraps ErrUnknown where there is
// none.
func (s *Store) Find(ctx context.Context, id string) (*Record, error) {
	all, _, err := s.load(ctx)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(r Record) bool { return r.ID == id })
	if i < 0 {
		return nil, fmt.Errorf("%w: %.32q", ErrUnknown, id)
	}
	return &all[i], nil
}

// Change puts r, as it was found and changed since. The error wraps ErrConflict
// when another changed it meanwhile; r can be changed again after success.
func (s *Store) Change(ctx context.Context, r *Record) error {
	v, err := s.seal(r)
	if err != nil {
		return err
	}
	revision, err := s.kv.Update(ctx, keyOf(r.slot), v, r.revision)
	if conflict(err) {
		return ErrConflict
	}
	if err != nil {
		return fmt.Errorf("proposal: %w", err)
	}
	r.revision = revision
	return nil
}

func conflict(err error) bool {
	var api *jetstream.APIError
	return errors.Is(err, jetstream.ErrKeyExists) ||
		errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence ||
			api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
}
