package filestore

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

func encoded(t testing.TB) []byte {
	t.Helper()
	raw, err := encode(&routing.State{
		Revision: 7,
		Roles:    map[string]routing.Row{"ma01": {Members: []string{"a", "b"}, Active: "a", Epoch: 3, Phase: routing.PhaseOpen}},
		Settings: map[string]string{"html": `<&> "ü" ` + "\u2028"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// signed is a table with a right checksum around any state.
func signed(state string) string {
	return fmt.Sprintf(`{"format":1,"crc32c":%q,"state":%s}`, checksum([]byte(state)), state)
}

// What cannot be trusted is "could not tell", never an empty table.
func TestDecodeRefuses(t *testing.T) {
	good := string(encoded(t))
	cases := map[string]struct{ raw, want string }{
		"empty":           {"", "damaged or cut off"},
		"zeros":           {strings.Repeat("\x00", 4096), "damaged or cut off"},
		"null":            {"null", "format 0"},
		"no object":       {"[]", "damaged or cut off"},
		"no state":        {`{"format":1}`, "no state"},
		"null state":      {signed("null"), "no object"},
		"empty state":     {signed("{}"), "revision 0"},
		"newer format":    {strings.Replace(good, `"format": 1`, `"format": 2, "new": 1`, 1), "format 2, this posthouse knows 1"},
		"unknown field":   {strings.Replace(good, `"format": 1`, `"format": 1, "new": 1`, 1), `unknown field "new"`},
		"unknown in row":  {signed(`{"revision":1,"roles":{"r":{"acitve":"a"}}}`), `unknown field "acitve"`},
		"wrong type":      {signed(`{"revision":-1}`), "cannot unmarshal"},
		"behind the end":  {good + "{}", "damaged or cut off"},
		"flipped bit":     {strings.Replace(good, `"active": "a"`, `"active": "c"`, 1), "damaged, or changed by hand"},
		"flipped epoch":   {strings.Replace(good, `"epoch": 3`, `"epoch": 2`, 1), "damaged, or changed by hand"},
		"missing summary": {strings.Replace(good, `"crc32c"`, `"crc"`, 1), `unknown field "crc"`},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			if _, err := decode([]byte(c.raw)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	for n := range len(good) - 1 { // only the last line end may be missing
		if _, err := decode([]byte(good[:n])); err == nil {
			t.Errorf("the first %d of %d bytes are taken for a table", n, len(good))
		}
	}
}

func TestDecodeTakesReindented(t *testing.T) {
	var compact bytes.Buffer
	if err := json.Compact(&compact, encoded(t)); err != nil {
		t.Fatal(err)
	}
	if s, err := decode(compact.Bytes()); err != nil || s.Revision != 7 {
		t.Errorf("got %+v, %v", s, err)
	}
}

// Every way into the store refuses a damaged table, a watch waits for a whole
// one, and no Update overwrites it.
func TestDamagedTable(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	file := filepath.Join(path, tableName)
	damage := func(t *testing.T, make func() error) {
		t.Helper()
		if err := make(); err != nil {
			t.Fatal(err)
		}
		if state, err := s.Load(t.Context()); err == nil {
			t.Errorf("Load = %+v", state)
		}
		if _, err := s.Update(t.Context(), count("r")); err == nil {
			t.Error("Update wrote over it")
		}
		if err := s.Join(t.Context(), "f1-aaaa"); err == nil {
			t.Error("Join believed it")
		}
	}
	damage(t, func() error { return os.WriteFile(file, nil, 0o600) })
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	damage(t, func() error { return os.Mkdir(file, 0o700) }) // unreadable for root too
	w := s.Watch(t.Context())
	select {
	case got := <-w:
		t.Errorf("the watch sent %+v of a table that cannot be read", got)
	case <-time.After(1200 * time.Millisecond): // longer than a poll
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	await(t, w, 0)
	if _, err := s.Update(t.Context(), count("r")); err != nil {
		t.Error(err)
	}
	await(t, w, 1)
}

// A watch that cannot read the table says so, once for each reason, and when it
// can read it again.
func TestUnreadableTableIsLogged(t *testing.T) {
	path := t.TempDir()
	s := openStore(t, path)
	core, logs := observer.New(zapcore.InfoLevel)
	s.log = zap.New(core)
	if _, err := s.Update(t.Context(), count("r")); err != nil {
		t.Fatal(err)
	}
	var seen table
	good := seen.look(t.Context(), s)
	if good == nil || good.Revision != 1 {
		t.Fatalf("read %+v", good)
	}
	file := filepath.Join(path, tableName)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ content, says string }{
		{"", "cannot be trusted: damaged or cut off"},
		{`{"format":99}`, "format 99"},
		{string(raw), "can be read again"},
		{"x", "cannot be trusted: damaged or cut off"},
	} {
		if err := os.WriteFile(file, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if got := seen.look(t.Context(), s); got != good {
				t.Errorf("%q made it %+v", c.content, got)
			}
		}
		all := logs.TakeAll()
		if len(all) != 1 || !strings.Contains(fmt.Sprint(all[0].Message, all[0].ContextMap()), c.says) {
			t.Errorf("%q: the log has %v, want %q once", c.content, all, c.says)
		}
	}
	for _, waited := range []string{"999ms", "1.001s"} {
		seen.note(s.log, fmt.Errorf("%w: waited %s", statedir.ErrLocked, waited))
	}
	if logs.Len() != 1 {
		t.Errorf("of a lock that is held the log has %v", logs.All())
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encoded(f))
	f.Add([]byte(signed(`{"revision":1,"roles":null}`)))
	f.Add([]byte(`{"format":1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := decode(raw)
		if raw == nil || err != nil {
			return
		}
		if s.Revision == 0 {
			t.Fatal("an empty table came from a file")
		}
		again, err := encode(s)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decode(again); err != nil {
			t.Fatalf("what was decoded cannot be encoded: %v", err)
		}
	})
}
