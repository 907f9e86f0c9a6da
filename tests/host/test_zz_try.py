def test_mini(mini, nodes, tmp_path):
    import torch, comfy.sample
    print(sorted(nodes))
    image = torch.rand(2, 50, 70, 3); mask = torch.zeros(2, 50, 70); mask[:, 10:40, 20:50] = 1
    with torch.inference_mode():
        out = nodes["Likeness_ExtractID"].execute(mini.adapter, mini.encoders, image, "concat", "error", mask)
        subject = out.args[0]; print(out.args[2])
        c = nodes["Likeness_EncodePrompt"].execute(mini.clip, "a photo of a (cat:1.2) in snow", "cat", 0, "error")
        print(c.args[2])
        n = nodes["Likeness_EncodePrompt"].execute(mini.clip, "", "cat", 0, "pass through")
        print(n.args[2])
        r = nodes["Likeness_DualLevelInjector"].execute(mini.model, c.args[0], n.args[0], subject, c.args[1], "free pose", 1., 1., 0., 1.)
        print(r.args[3])
        w = nodes["Likeness_LayerWeights"].execute(mini.adapter, "custom", 1., .5, .2, 1., .5, "output.3.0: 0.7")
        print(w.args)
        def run(m, p, q):
            lat = torch.zeros(1, 48, 8, 8)
            return comfy.sample.sample(m, comfy.sample.prepare_noise(lat, 1), 2, 4., "euler", "normal", p, q, lat, seed=1)
        a = run(mini.model, c.args[0], n.args[0]); b = run(r.args[0], r.args[1], r.args[2])
        print(a.std(), (a - b).abs().mean(), mini.vae.decode(b).shape)
        assert not torch.equal(a, b)
