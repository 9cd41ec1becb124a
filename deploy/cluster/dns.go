package main

// Only the plugins that config/Corefile names: all of CoreDNS's plugins would double the code to compile.
import (
	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
)

func init() {
	// In the order in which they handle a query.
	dnsserver.Directives = []string{"bind", "errors", "cache", "kubernetes"}
}
