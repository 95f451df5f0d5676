package natsfeed

import (
	"testing"
	"time"
)

// TestPace: what is asked for doubles as long as answers are quick, without a
// pause, and goes down to the least, with pauses, while they are slow.
func TestPace(t *testing.T) {
	p := pace(pieceFirst)
	for range 10 {
		if rest := p.took(time.Millisecond); rest != 0 {
			t.Fatalf("a pause of %s after a quick answer", rest)
		}
	}
	if p != pieceBytes {
		t.Errorf("%d bytes, want %d", p, pieceBytes)
	}
	paused := time.Duration(0)
	for range 100 {
		rest := p.took(time.Second)
		if rest < 0 || rest >= time.Second {
			t.Fatalf("a pause of %s after an answer that took a second", rest)
		}
		paused += rest
	}
	if p != pieceLeast || paused < 20*time.Second {
		t.Errorf("%d bytes, want %d; %s of pauses, want some 50 s", p, pieceLeast, paused)
	}
	if p.took((quick+slow)/2) != 0 || p != pieceLeast {
		t.Error("an answer that is neither quick nor slow changes something")
	}
}

// TestJitter: those who failed together are spread over as long as they wait.
func TestJitter(t *testing.T) {
	least, most := time.Hour, time.Duration(0)
	for range 1000 {
		d := jitter(time.Second)
		least, most = min(least, d), max(most, d)
	}
	if least < time.Second/2 || most >= 3*time.Second/2 || most-least < 900*time.Millisecond {
		t.Errorf("from %s to %s", least, most)
	}
}
