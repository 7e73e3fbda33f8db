package integration

import (
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// turn is one exchange: what the client says, and how the line begins that
// answers it. Lines before that one are passed over.
type turn struct{ say, want string }

// useOf has, for each capability token that posthouse announces before login,
// the exchange that a client is entitled to by it. Tokens with arguments are
// looked up with them, else by their first word; word is the argument.
func useOf(protocol, word string) map[string][]turn {
	base := func(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }
	ir := plain("", "u0001", password)
	switch protocol {
	case "imap":
		in := turn{"l AUTHENTICATE PLAIN " + ir, "l OK"}
		return map[string][]turn{
			"IMAP4rev1":     {{"a NOOP", "a OK"}, {"b CAPABILITY", "b OK"}, in, {"c SELECT INBOX", "c OK"}},
			"SASL-IR":       {in},
			"LITERAL-":      {{"a LOGIN {5+}\r\nu0001 {6+}\r\nsecret", "a OK"}},
			"ID":            {{`a ID ("name" "test")`, "a OK"}},
			"ENABLE":        {in, {"a ENABLE CONDSTORE", "a OK"}},
			"IDLE":          {in, {"a SELECT INBOX", "a OK"}, {"b IDLE", "+"}, {"DONE", "b OK"}},
			"STARTTLS":      {{"a STARTTLS", "a OK"}},
			"LOGINDISABLED": {{"a LOGIN u0001 secret", "a NO [PRIVACYREQUIRED]"}},
			"AUTH=PLAIN":    {{"a AUTHENTICATE PLAIN", "+"}, {ir, "a OK"}},
			"AUTH=LOGIN":    {{"a AUTHENTICATE LOGIN", "+"}, {base("u0001"), "+"}, {base(password), "a OK"}},
		}
	case "pop3":
		in := turn{"AUTH PLAIN " + ir, "+OK"}
		refused := []turn{{"AUTH PLAIN " + plain("", "u0001", "wrong"), "-ERR [AUTH]"}}
		return map[string][]turn{
			"PIPELINING":     {{"USER u0001\r\nPASS secret\r\nSTAT\r\nQUIT", "+OK 1 "}},
			"RESP-CODES":     refused,
			"AUTH-RESP-CODE": refused,
			"UIDL":           {in, {"UIDL 1", "+OK 1 "}},
			"TOP":            {in, {"TOP 1 0", "Subject: hello"}, {"", "."}},
			"STLS":           {{"STLS", "+OK"}},
			"USER":           {{"USER u0001", "+OK"}, {"PASS secret", "+OK"}},
			"SASL PLAIN":     {{"AUTH PLAIN", "+ "}, {ir, "+OK"}},
			"SASL LOGIN":     {{"AUTH LOGIN", "+ "}, {base("u0001"), "+ "}, {base(password), "+OK"}},
		}
	}
	in := turn{`AUTHENTICATE "PLAIN" "` + ir + `"`, "OK"}
	put := func(script string) []turn {
		return []turn{in, {fmt.Sprintf("PUTSCRIPT \"x\" {%d+}\r\n%s", len(script), script), "OK"}}
	}
	return map[string][]turn{
		"IMPLEMENTATION": {{"NOOP", "OK"}},
		"VERSION 1.0":    {in, {`HAVESPACE "x" 100`, "OK"}},
		"STARTTLS":       {{"STARTTLS", "OK"}},
		"SASL":           {{in.say, "NO (ENCRYPT-NEEDED)"}},
		"SASL PLAIN":     {in},
		"SASL LOGIN":     {{`AUTHENTICATE "LOGIN" "` + base("u0001") + `"`, base("Password:")}, {`"` + base(password) + `"`, "OK"}},
		"SIEVE":          put(`require "` + word + `"; keep;`),
		"NOTIFY mailto":  put(`require "enotify"; notify "mailto:a@example.org";`),
		"EXTLISTS":       {{"NOOP", "OK"}}, // Cyrus 3.6 announces extlists and refuses a script that requires it
		// It works with two others only.
		"SIEVE extracttext": put(`require ["variables", "foreverypart", "extracttext"]; keep;`),
		"SIEVE extlists":    {{"NOOP", "OK"}}, // the same
	}
}

// announced reads the capabilities of one door, one token each: a word, or for
// keys with a list the key and one word of it.
func announced(t *testing.T, p *posthouse, door string) []string {
	t.Helper()
	w := p.knock(t, door)
	var tokens []string
	switch protocol, _, _ := strings.Cut(door, "/"); protocol {
	case "imap":
		must(t, w.say("a CAPABILITY"))
		_, line, err := w.until(5*time.Second, "* CAPABILITY ")
		must(t, err)
		tokens = strings.Fields(line)[2:]
	case "pop3":
		must(t, w.say("CAPA"))
		_, _, err := w.until(5*time.Second, "+OK")
		must(t, err)
		lines, _, err := w.until(5*time.Second, ".")
		must(t, err)
		tokens = listed(lines, "SASL")
	case "sieve":
		must(t, w.say("CAPABILITY"))
		lines, _, err := w.until(5*time.Second, "OK")
		must(t, err)
		for i, line := range lines {
			lines[i] = strings.TrimSpace(strings.ReplaceAll(line, `"`, ""))
		}
		tokens = listed(lines, "SASL", "SIEVE", "NOTIFY", "VERSION")
	}
	return tokens
}

func listed(lines []string, keys ...string) (tokens []string) {
	for _, line := range lines {
		words := strings.Fields(line)
		if !slices.Contains(keys, words[0]) || len(words) == 1 {
			tokens = append(tokens, words[0])
			continue
		}
		for _, word := range words[1:] {
			tokens = append(tokens, words[0]+" "+word)
		}
	}
	return tokens
}

// knock connects to a door and reads the greeting.
func (p *posthouse) knock(t *testing.T, door string) *wire {
	t.Helper()
	protocol, tls, _ := strings.Cut(door, "/")
	config := lab.ca.client(p.name)
	if tls == "starttls" {
		config = nil
	}
	w, err := dialWire(p.service().at[door], config)
	must(t, err)
	_, _, err = w.keep(t).until(5*time.Second, map[string]string{"imap": "* OK", "pop3": "+OK", "sieve": "OK"}[protocol])
	must(t, err)
	return w
}

// beforeTLS are the tokens that say something of the time before TLS; the
// others are used under TLS, whatever door announced them.
var beforeTLS = []string{"STARTTLS", "STLS", "LOGINDISABLED", "SASL"}

// TestEveryToken: what posthouse announces, it does; and it announces nothing
// that is not in the table.
func TestEveryToken(t *testing.T) {
	t.Parallel()
	every := func(t *testing.T, p *posthouse) {
		p.as(t, "u0001").imap(5*time.Second, "LOGOUT") // it learns what the backends announce
		used := map[string]bool{}
		for _, door := range slices.Sorted(maps.Keys(p.service().at)) {
			protocol, _, _ := strings.Cut(door, "/")
			for _, token := range announced(t, p, door) {
				key, word, _ := strings.Cut(token, " ")
				uses := useOf(protocol, word)
				turns, known := uses[token]
				if !known {
					turns, known = uses[key]
				}
				if !known {
					t.Errorf("%s announces %q, and no test uses it", door, token)
					continue
				}
				at := protocol + "/implicit"
				if strings.HasSuffix(door, "/starttls") && slices.Contains(beforeTLS, token) {
					at = door
				}
				if used[at+" "+token] {
					continue
				}
				used[at+" "+token] = true
				w := p.knock(t, at)
				for _, turn := range turns {
					if turn.say != "" {
						must(t, w.say("%s", turn.say))
					}
					if _, _, err := w.until(10*time.Second, turn.want); err != nil {
						t.Errorf("%s announces %q, but: %v", door, token, err)
						break
					}
				}
				w.Close()
			}
		}
	}
	t.Run("cyrus", func(t *testing.T) {
		pair := newCyrusPair(t, "u0001")
		pair.a.deliver(t, "u0001", "hello")
		every(t, startFrontend(t, newSite(t, pair.a.backend(), pair.b.backend(), "u0001")))
	})
	t.Run("dovecot", func(t *testing.T) {
		a, b := newDovecot(t), newDovecot(t)
		a.deliver(t, "u0001", "hello")
		every(t, startFrontend(t, newSite(t, a.backend(), b.backend(), "u0001")))
	})
}
