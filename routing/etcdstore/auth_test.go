package etcdstore

import (
	"strings"
	"testing"
	"time"
)

// etcd demands a user.
func TestUser(t *testing.T) {
	t.Parallel()
	c := newCluster(t, 1)
	client := c.client()
	ctx := within(t, patient)
	if _, err := client.UserAdd(ctx, "root", "secret"); err != nil {
		t.Fatal(err)
	}
	if _, err := client.UserGrantRole(ctx, "root", "root"); err != nil {
		t.Fatal(err)
	}
	if _, err := client.AuthEnable(ctx); err != nil {
		t.Fatal(err)
	}
	s := openStore(t, t.TempDir(), Options{Endpoints: c.urls(), User: "root", Password: "secret"})
	update(t, s, bump)
	joinAs(t, s, "f-a")
	w := s.Watch(t.Context())
	until(t, w, "the first", switches(1))
	// It forgets the tokens that it gave out.
	c[0].kill()
	c[0].start()
	eventually(t, "etcd takes changes again", func() bool {
		_, err := s.Update(within(t, 3*time.Second), bump)
		if err != nil {
			t.Log(err)
		}
		return err == nil
	})
	until(t, w, "a change after that", switches(2))

	for name, opt := range map[string]Options{
		"wrong password": {Endpoints: c.urls(), User: "root", Password: "guess"},
		"nobody":         {Endpoints: c.urls()},
	} {
		begin := time.Now()
		_, err := openStore(t, t.TempDir(), opt).Load(within(t, patient))
		if err == nil || !strings.Contains(err.Error(), c[0].url) || time.Since(begin) > patient/2 {
			t.Errorf("%s: Load = %v after %v", name, err, time.Since(begin))
		}
	}
}
